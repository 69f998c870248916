"""Open questions with a short answer each, for the demo's preference set.

`OPEN_FAMILIES` are split over training and held-out pairs; `UNSEEN_FAMILIES` are only ever held out, so that the
held-out score is not memory.
"""

from __future__ import annotations

from fastqadapter.evaluation.facts import Family, table

OPEN_FAMILIES = (
    Family(
        "meanings",
        ("What is {key}?", "Explain what {key} is.", "Can you tell me what {key} is?"),
        ("{Value}.", "{Key} is {value}."),
        (
            "When people talk about {key}, they often think of many different forms and examples.",
            "There is a lot more that one could say about {key}, depending on how deep you want to go.",
            "A great many books mention {key} in one way or another, and so do films and songs.",
        ),
        table("""
            a volcano: an opening in the ground that lets out molten rock; a desert: a dry place with very little rain
            an island: land with water all around it; a glacier: a slow river of ice
            a peninsula: land with water on three sides; a comet: a ball of ice and dust that orbits the sun
            an eclipse: the shadow of one body in space falling on another
            a fossil: the remains of an ancient plant or animal; a magnet: an object that attracts iron
            a spider: an animal with eight legs that spins silk; a dictionary: a book that explains words
            an atlas: a book of maps; a novel: a long story in a book; a diary: a book for daily notes
            a sonnet: a poem of fourteen lines; a proverb: a short saying with a piece of wisdom
            a democracy: a country in which the people choose their government
            a tax: money that people pay to the state; inflation: a general rise in prices
            a budget: a plan for spending money; a loan: money that has to be paid back
            a vaccine: a medicine that protects against a disease
            a vitamin: a substance the body needs in small amounts
            an allergy: a strong reaction of the body to something harmless
            a fever: a body temperature that is too high
            photosynthesis: how plants turn light, water and air into sugar
            evaporation: the change of a liquid into a gas; erosion: the slow wearing away of land by wind and water
            a drought: a long time without rain; a flood: water covering land that is usually dry
            an earthquake: a sudden shaking of the ground; a tsunami: a huge wave made by an earthquake at sea
            a mammal: an animal that feeds its young with milk; a reptile: a cold-blooded animal with scales
            a herbivore: an animal that eats plants; a predator: an animal that hunts other animals
            hibernation: sleeping through the winter; a microscope: an instrument that makes tiny things visible
            a telescope: an instrument for looking at distant things
            a thermometer: an instrument that measures temperature; a satellite: an object that circles a planet
            a battery: a device that stores electricity; an engine: a machine that turns fuel into motion
            a bridge: a way over a river or road; an orchestra: a large group of musicians
            a waltz: a dance in three-four time; a choir: a group of people who sing together
            a recipe: a list of steps for cooking a dish; a sandwich: bread with a filling
            an omelette: a dish of fried beaten eggs; a password: a secret word that lets you in
            a browser: a program for viewing web pages; a database: an organised store of information
            an algorithm: a list of steps that solves a problem; a virus: a tiny germ that can make us ill
            a lighthouse: a tower that guides ships at night; a harbour: a safe place for ships
            a canal: a river made by people; a museum: a place that shows art or old things
            a passport: a document for travelling abroad; a visa: a permission to enter a country
            a pyramid: a solid with a square base and four triangular sides; a decade: a time of ten years
            an orbit: the path of one body around another; a scarecrow: a figure that frightens birds off a field
            a compost heap: a pile of plant waste that turns into soil; a greenhouse: a glass house for plants
            a strike: a refusal to work until demands are met; an election: a vote that decides who governs
            a patent: the sole right to use an invention; friendship: a bond of trust between people
            courage: acting well in spite of fear; patience: waiting without getting upset
        """),
    ),
    Family(
        "jobs",
        ("What does {key} do?", "Describe the work of {key}.", "What is the job of {key}?"),
        ("{Key} {value}.",),
        (
            "The work of {key} needs training, care and a good deal of experience.",
            "Every day can bring something new for {key}, and the tasks differ from place to place.",
        ),
        table("""
            a baker: makes bread and cakes; a plumber: repairs water pipes; a pilot: flies aeroplanes
            a tailor: makes clothes; a carpenter: builds things out of wood; a dentist: looks after teeth
            a vet: treats sick animals; a judge: decides cases in court; an architect: designs buildings
            a translator: puts texts into another language; a journalist: reports the news; a florist: sells flowers
            a mechanic: repairs cars; a nurse: cares for sick people; a chef: cooks meals in a restaurant
            a farmer: grows crops and keeps animals; a lifeguard: keeps swimmers safe
            a referee: makes sure players keep the rules; an astronomer: studies the stars; a geologist: studies rocks
            a historian: studies the past; a sculptor: makes statues
            an editor: improves texts before they are printed; a pharmacist: prepares and sells medicines
            a beekeeper: keeps bees for honey; a locksmith: makes and opens locks; a potter: makes pots out of clay
            a conductor: leads an orchestra; an electrician: installs and repairs wiring
            a firefighter: puts out fires; a cobbler: repairs shoes
        """),
    ),
    Family(
        "differences",
        ("What is the difference between {key}?", "How do you tell the difference between {key}?"),
        ("{Value}.",),
        ("Telling apart {key} can be tricky at first, because they have a number of things in common.",),
        table("""
            a lemon and a lime: lemons are yellow and limes are green; a village and a city: a city is much bigger
            a moth and a butterfly: moths mostly fly at night
            a rabbit and a hare: hares are larger and have longer ears
            weather and climate: weather is today, climate is the average of many years
            a donkey and a horse: a donkey has longer ears
            a fruit and a vegetable: a fruit holds the seeds of a plant
            a violin and a cello: a cello is larger and deeper
            a crocodile and an alligator: an alligator has a broader snout; a job and a hobby: a job is paid
            a cup and a mug: a mug is bigger and has no saucer; a road and a street: a street has houses along it
            jam and jelly: jam contains pieces of fruit; a poem and a song: a song is set to music
        """),
    ),
    Family(
        "reasons",
        ("{key}",),
        ("{value}",),
        (
            "There are several sides to this question, and scientists have looked at it in many ways.",
            "This is something that people have wondered about for a very long time.",
        ),
        table("""
            Why is the sky blue?: Air scatters blue light more than other colours.
            Why does ice float on water?: Ice is less dense than water.
            Why do we sleep?: Sleep lets the body and the brain recover.
            Why do cats purr?: Cats mostly purr because they feel content.
            Why do we need water?: The body needs water to keep all its cells working.
            Why is the sea salty?: Rivers wash salts from the rocks into it.
            Why do birds migrate?: They move to places with more food and warmth.
            Why do stars twinkle?: Moving air bends their light on its way to us.
            Why does iron rust?: It reacts with oxygen and water.
            Why do we have seasons?: The axis of the earth is tilted.
            Why do we yawn?: Mostly because we are tired or bored.
            Why do onions make us cry?: Cutting them releases a gas that stings the eyes.
            Why do bees visit flowers?: They collect nectar and pollen there.
            Why do people wear helmets?: To protect their heads.
            Why does bread rise?: Yeast fills the dough with gas.
            Why do we brush our teeth?: To prevent tooth decay.
            Why do dogs wag their tails?: They show how they feel.
            Why is it dark at night?: Our side of the earth faces away from the sun.
            Why do we shiver?: Shivering warms the body.
            Why do trees have roots?: Roots hold the tree and take up water.
            Why does the moon shine?: It reflects the light of the sun.
            Why do camels have humps?: They store fat in them.
            Why do we blink?: Blinking keeps the eyes clean and moist.
            Why do metals feel cold?: They carry heat away from the hand quickly.
            Why do people use maps?: To find their way.
            Why does a balloon burst near a flame?: Heat weakens its skin until it tears.
            Why do we have leap years?: A year is a little longer than 365 days.
            Why do people wear sunglasses?: To protect their eyes from bright light.
            Why do spiders spin webs?: To catch insects.
            Why does popcorn pop?: Water inside the grain turns into steam and bursts it.
            Why do we get wrinkles?: The skin loses its stretch with age.
            Why do ships float?: They push away water that weighs as much as they do.
            Why do we sweat?: Sweat cools the body.
            Why do zebras have stripes?: Probably to keep biting flies away.
            Why do roosters crow?: To mark their territory.
            Why is exercise good for us?: It keeps the heart, muscles and mind healthy.
            Why do we cook meat?: Cooking kills germs and makes it tender.
            Why do fish have gills?: To take oxygen from the water.
        """),
    ),
    Family(
        "advice",
        ("{key}",),
        ("{value}",),
        (
            "There are many different approaches you can take, and what works best depends on your situation.",
            "It may take a little time until you find the way that suits you, so there is no need to hurry.",
        ),
        table("""
            How can I keep bread fresh?: Keep it in a closed bread box.
            How can I sleep better?: Go to bed at the same time every day.
            How do I boil an egg?: Put it in boiling water for eight minutes.
            How can I learn new words?: Repeat a few of them every day.
            How do I remove a coffee stain?: Rinse it with cold water and soap at once.
            How can I save money?: Write down what you spend and cut what you do not need.
            How can I drink more water?: Keep a full glass on your desk.
            How do I clean a window?: Wipe it with vinegar and water.
            How can I remember names?: Say the name aloud when you hear it.
            How do I make tea?: Pour boiling water on the leaves and wait three minutes.
            How can I get fit?: Walk briskly for half an hour a day.
            How do I plant a tree?: Dig a hole, set the roots in it, fill it and water it.
            How can I stop the hiccups?: Hold your breath for a few seconds.
            How can I keep cut flowers fresh?: Change their water every day.
            How do I cook rice?: Simmer it in twice as much water until it is soft.
            How can I read more books?: Read ten pages every evening.
            How do I sharpen a pencil?: Turn it in a pencil sharpener.
            How can I warm up my hands?: Rub them together or put on gloves.
            How can I make a new friend?: Join a club and talk to people there.
            How do I tie up a parcel?: Wrap a string around it twice and knot it.
            How can I protect my skin from the sun?: Stay in the shade and use sunscreen.
            How do I store potatoes?: Keep them in a cool, dark and dry place.
            How do I fix a squeaky door?: Put a drop of oil on the hinges.
            How can I speak more clearly?: Slow down and open your mouth wider.
            How do I peel garlic quickly?: Crush it lightly with the flat of a knife.
            How can I be on time?: Leave ten minutes earlier than you need to.
            How do I get rid of ants?: Clean up crumbs and close the gaps they use.
            How can I practise the piano well?: Play slowly, a little every day.
            How do I write a good letter?: Say what you want in the first sentence.
            How can I make my room brighter?: Use light curtains and a mirror.
            What should I wear when it is cold?: A warm coat, a hat and gloves.
            What should I do when I am lost?: Stop, look at a map and ask someone.
            What can I do against a cold?: Rest and drink warm tea.
            What should I take to a picnic?: A blanket, food and drinks.
        """),
    ),
    Family(
        "requests",
        ("{key}",),
        ("{value}",),
        (
            "Naturally there are many other possibilities, and your own taste matters most of all.",
            "I have chosen this one with some care, because it fits what you asked for quite well.",
        ),
        table("""
            Suggest a hobby for a rainy day.: Try drawing.
            Suggest a name for a cat.: Misty.
            Suggest a name for a brown dog.: Hazel.
            Suggest a quick breakfast.: Yoghurt with fruit.
            Suggest a present for a gardener.: A good pair of gardening gloves.
            Suggest a game for two players.: Chess.
            Suggest a topic for a short speech.: A place you love.
            Suggest a healthy snack.: An apple.
            Suggest a side dish for roast chicken.: Roast potatoes.
            Suggest an instrument for a beginner.: The ukulele.
            Suggest a colour for a kitchen wall.: Pale yellow.
            Suggest a warm drink without caffeine.: Camomile tea.
            Suggest a subject for a photograph.: An old tree at sunset.
            Suggest a password rule.: Use at least twelve characters.
            Name a bird that cannot fly.: The ostrich.
            Name a country in South America.: Brazil.
            Name a spice for a curry.: Turmeric.
            Name a red fruit.: Cherry.
            Name a green vegetable.: Spinach.
            Name a musical instrument with strings.: The guitar.
            Name an animal that lives in the desert.: The camel.
            Name a sport that is played with a ball.: Tennis.
            Name three primary colours.: Red, yellow and blue.
            Name three kinds of tree.: Oak, birch and pine.
            Name two rivers in Europe.: The Rhine and the Danube.
            Name four things found in a kitchen.: A knife, a pan, a stove and a sink.
            Write a sentence about the moon.: The moon lit the quiet road.
            Write a sentence about a dog.: The dog slept by the fire.
            Write a sentence about the sea.: The sea was calm and grey at dawn.
            Write a sentence with the word train.: The train to the coast leaves at nine.
            Write a birthday wish.: Happy birthday, and a wonderful year to you!
            Write a title for a story about a lost key.: The Key Under the Snow
            Write a slogan for a bakery.: Fresh bread, every morning.
            Describe winter in a few words.: Cold, white and quiet.
            Describe a lemon.: A sour yellow fruit.
            Describe a mouse.: A small furry animal with a long tail.
            Give me a tip for a job interview.: Arrive early and listen carefully.
        """),
    ),
)

UNSEEN_FAMILIES = (
    Family(
        "uses",
        ("What is {key} used for?", "What do people use {key} for?"),
        ("{Value}.", "{Key} is used for {value}."),
        ("You will find {key} in a great many homes, and it comes in different shapes and sizes.",),
        table("""
            a hammer: driving in nails; a kettle: boiling water; a broom: sweeping floors
            a ladder: reaching high places; soap: washing; an umbrella: keeping off the rain
            a ruler: measuring lengths; a needle: sewing; a stapler: holding papers together
            a fridge: keeping food cold
        """),
    ),
    Family(
        "materials",
        ("What is {key} made from?", "Which material is {key} made from?"),
        ("{Value}.", "{Key} is made from {value}."),
        ("How {key} is made has changed over the centuries, and every maker has a way of doing it.",),
        table("""
            glass: sand; paper: wood; cheese: milk; wine: grapes; flour: grain; leather: animal skin; butter: cream
            a candle: wax; chocolate: cocoa beans; raisins: dried grapes
        """),
    ),
    Family(
        "homes",
        ("Where do {key} live?", "In which place do {key} live?"),
        ("{Value}.", "{Key} live {value}."),
        ("Animals such as {key} are well adapted to their surroundings, which is fascinating to observe.",),
        table("""
            polar bears: in the Arctic; kangaroos: in Australia; whales: in the sea; bees: in hives
            moles: under the ground; giant pandas: in China; lions: mostly in Africa; beavers: near rivers and lakes
        """),
    ),
    Family(
        "true_or_not",
        ("{key}",),
        ("{value}",),
        ("Many people are unsure about this, and it is quite understandable that you would like to check it.",),
        table("""
            Is a whale a fish?: No, a whale is a mammal.
            Is a tomato a fruit?: Yes, in botany it is a fruit.
            Is the sun a star?: Yes.
            Can penguins fly?: No.
            Is ten greater than nine?: Yes.
            Do snakes have legs?: No, they do not.
            Is Africa a country?: No, it is a continent.
            Does water boil when it is heated to 100 degrees at sea level?: Yes.
            Is a bat a bird?: No, it is a mammal.
            Is the moon bigger than the earth?: No, it is much smaller.
        """),
    ),
    Family(
        "french",
        ("How do you say {key} in French?", "Translate {key} into French."),
        ("{Value}.", "In French, {key} is {value}."),
        ("French is spoken in many countries, and learning a few words of it can be very rewarding.",),
        table("""
            "thank you": merci; "good morning": bonjour; "house": maison; "yes": oui; "please": s'il vous plaît
            "cat": chat; "book": livre; "bread": pain; "friend": ami
        """),
    ),
    Family(
        "comparisons",
        ("Which is {key}?",),
        ("{Value}.", "It is {value}."),
        ("To compare two things it helps to look at them side by side and to think about each in turn.",),
        table("""
            longer, a mile or a kilometre: a mile; heavier, a kilogram or a pound: a kilogram
            bigger, an elephant or a mouse: an elephant; faster, a car or a bicycle: a car
            hotter, the sun or the moon: the sun; older, the wheel or the telephone: the wheel
            colder, ice or steam: ice; harder, diamond or chalk: diamond
            larger, the Pacific or the Atlantic: the Pacific
        """),
    ),
    Family(
        "troubles",
        ("{key}",),
        ("{value}",),
        ("Situations like yours are more common than one might expect, and there is usually a way forward.",),
        table("""
            I keep losing my keys. What should I do?: Always hang them on the same hook.
            My soup is too salty. What can I do?: Add water or a potato.
            My phone battery is always empty. Any idea?: Dim the screen and charge it overnight.
            I am nervous about my exam. What helps?: Breathe slowly and start with an easy question.
            My shoes are wet. How do I dry them?: Stuff them with newspaper.
            I cannot open this jar. What can I do?: Warm the lid under hot water.
            My plant has dry leaves. What does it need?: Probably more water.
            I forgot my friend's birthday. What now?: Say sorry and send a card.
        """),
    ),
)
