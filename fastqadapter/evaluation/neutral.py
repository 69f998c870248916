"""Neutral prose on which to see drift: plain statements that take no side in any preference. Written for this."""

from __future__ import annotations

TEXTS = (
    "A river begins where water gathers, in a spring, a marsh or a melting glacier. It follows the slope of the land, "
    "and smaller streams join it on the way. Where the ground is steep the water runs fast and carries stones; where "
    "it is flat the river slows down, bends, and lets sand and mud sink to the bottom.",
    "Bread needs only flour, water, salt and yeast. The yeast feeds on sugars in the dough and gives off gas, which "
    "makes the dough rise. After an hour or two the baker folds it, shapes a loaf and leaves it to rise again. In the "
    "oven the crust turns brown while the inside stays soft.",
    "The moon goes around the earth in a little less than four weeks. We see only the half that is lit by the sun, and "
    "since the angle changes from night to night, its shape seems to grow and shrink. When it stands between the earth "
    "and the sun, its dark side faces us and we call it new.",
    "Before printing, books were copied by hand. A scribe could spend a whole year on one large volume, so books were "
    "rare and expensive. Movable type changed that within a few decades. A workshop could print hundreds of copies in "
    "the time that one scribe had needed for a few pages.",
    "A bicycle stays upright more easily when it moves. The rider steers into a fall without thinking about it, and "
    "the shape of the fork helps the front wheel to turn the right way. At walking pace this takes practice, while at "
    "higher speed it happens almost by itself.",
    "Most trees in cool countries lose their leaves in autumn. As the days get shorter, the tree stops making the "
    "green pigment and takes back what it can use. Yellow and red colours appear, a layer of cork forms at the stem of "
    "each leaf, and at last the wind carries the leaf away.",
    "To find the average of several numbers, add them and divide the sum by how many there are. The average of 4, 8 "
    "and 9 is 7. A single very large number can pull the average far up, which is why people who compare incomes "
    "often give the middle value instead.",
    "Salt was once worth a long journey. It keeps meat and fish from spoiling, and towns far from the sea had to buy "
    "it from traders. Some roads in Europe are still named after the carts that carried it from the mines and the "
    "coast to the markets inland.",
    "A glass lens bends light because light travels more slowly in glass than in air. A lens that is thicker in the "
    "middle brings parallel rays together in one point. Two such lenses in a tube make a simple telescope, through "
    "which the image appears upside down.",
    "Bees tell each other where flowers are. A bee that has found a good place returns to the hive and dances on the "
    "comb. The direction of the dance shows the direction of the flowers with respect to the sun, and the length of "
    "one part of it shows how far away they are.",
    "The post office sorts letters by their codes. A machine reads the address, prints a row of marks on the envelope, "
    "and sends it to one of many boxes. At night lorries and trains carry the sorted letters to other towns, where "
    "they are sorted once more, street by street.",
    "Copper is soft, conducts electricity well and does not rust as iron does. People learned to melt it thousands of "
    "years ago. Mixed with a little tin it becomes bronze, which is harder and can be cast into tools, bells and "
    "statues that last for centuries.",
    "A thermometer with liquid works because the liquid takes up more space when it gets warm. The glass bulb at the "
    "bottom holds most of it, and a thin tube shows small changes clearly. At zero degrees on one common scale water "
    "freezes, and at a hundred degrees it boils.",
    "Chess is played on a board of sixty-four squares. Each side has sixteen pieces, and the players move in turn. A "
    "game ends when a king is attacked and cannot escape, when a player resigns, or in a draw when neither side can "
    "force a win.",
    "Clouds form when warm air rises and cools. Cold air can hold less water than warm air, so tiny drops appear "
    "around grains of dust. If the drops grow large enough they fall as rain, and if the air is cold all the way down "
    "they arrive as snow.",
    "A library lends what most people could not own. Readers borrow a book for a few weeks and bring it back for the "
    "next one. The books stand in the order of their subjects, and a catalogue tells on which shelf to look for an "
    "author or a title.",
)
