"""Does an adapter learn the preference, does the model forget: measured for any dials, without training again."""
