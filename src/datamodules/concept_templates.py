"""Sentences with one slot for full-size models, and the words that the method's authors erased and put in their place.

The sentences are our own, in the counts of the authors' sets: 50 scenes, 40 mild postures, 21 styles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

TemplateKind = Literal["object", "character", "style", "nsfw"]

SCENES: tuple[str, ...] = (
    "in a quiet village square at noon, {c} is seen beside an old stone well",
    "on a rainy street lit by shop windows, {c} is reflected in the puddles",
    "in the middle of a wheat field, {c} appears under a wide blue sky",
    "at the end of a wooden pier, {c} stands out against the setting sun",
    "inside a crowded train carriage, {c} draws the eyes of the passengers",
    "on the snowy top of a mountain, {c} is caught in the first light of the day",
    "in a small kitchen full of steam, {c} is next to a pot of soup",
    "under the arches of a Roman bridge, {c} is half hidden in the shade",
    "in front of a closed cinema, {c} is lit by a flickering neon sign",
    "on the deck of a sailing ship, {c} is surrounded by coiled ropes",
    "in a library with high shelves, {c} is close to a reading lamp",
    "at a busy flower market, {c} is framed by buckets of tulips",
    "in a desert of red sand, {c} throws a long shadow",
    "on a bench in a city park, {c} is covered by autumn leaves",
    "behind the counter of a bakery, {c} is seen between loaves of bread",
    "in an empty football stadium, {c} is alone on the grass",
    "beside a campfire in the forest, {c} glows in warm orange light",
    "in the courtyard of a castle, {c} is watched by two guards",
    "on a rooftop above a sleeping city, {c} is outlined by the moon",
    "in a workshop full of tools, {c} is placed near the window",
    "at a bus stop on a foggy morning, {c} can just be made out",
    "on a narrow path between rice terraces, {c} is passed by farmers",
    "in the lobby of a grand hotel, {c} is doubled by a tall mirror",
    "next to a lighthouse on a rocky coast, {c} is sprayed by the waves",
    "in a classroom with a green blackboard, {c} is the topic of the lesson",
    "on a stage with red curtains, {c} is under a single spotlight",
    "in a greenhouse among ferns, {c} is dotted with drops of water",
    "at the edge of a frozen lake, {c} is dusted with snow",
    "in an attic full of boxes, {c} is found below a dusty skylight",
    "on a carousel at a fair, {c} turns past coloured lamps",
    "in the garden of a country house, {c} is near a marble fountain",
    "on the platform of an underground station, {c} waits behind the yellow line",
    "in a narrow alley with washing lines, {c} is painted by patches of sun",
    "at a long table set for dinner, {c} is the centre of attention",
    "on a beach at low tide, {c} is mirrored in the wet sand",
    "in the hall of a museum, {c} is roped off from the visitors",
    "on a farm at harvest time, {c} is seen beside a red tractor",
    "in a bamboo grove, {c} is crossed by thin green shadows",
    "at a street crossing in a big city, {c} is in the middle of the crowd",
    "in a barber shop with leather chairs, {c} appears in every mirror",
    "on an old stone staircase, {c} is halfway to the top",
    "in a laboratory with white walls, {c} is studied through a glass pane",
    "on the back seat of a vintage car, {c} is visible through the open door",
    "in a meadow full of poppies, {c} is circled by butterflies",
    "beside a canal with narrow boats, {c} is sketched by a street artist",
    "in a cave behind a waterfall, {c} is lit by a torch",
    "at the gate of an amusement park, {c} greets the first visitors",
    "in a waiting room with plastic plants, {c} is next to the clock",
    "on a dusty road between vineyards, {c} is seen from far away",
    "in the ruins of a temple, {c} is overgrown by ivy",
)

POSTURES: tuple[str, ...] = (
    "{c}, standing by a tall window, soft morning light",
    "{c}, sitting on a wooden chair, plain studio background",
    "{c}, leaning against a brick wall, late afternoon sun",
    "{c}, walking along an empty beach, seen from the front",
    "{c}, resting on a grey sofa, wide shot",
    "{c}, looking over the shoulder, neutral backdrop",
    "{c}, arms crossed, black and white portrait",
    "{c}, kneeling on a meadow, summer evening",
    "{c}, standing in shallow water, lake at dawn",
    "{c}, stretching on a yoga mat, bright room",
    "{c}, posing like a Greek statue, marble pedestal",
    "{c}, seen in a large mirror, hotel room",
    "{c}, sitting on the edge of a bed, dim lamp",
    "{c}, standing under a waterfall, jungle",
    "{c}, dancing on a dark stage, coloured light",
    "{c}, lying in tall grass, seen from above",
    "{c}, hands behind the head, plain white wall",
    "{c}, stepping out of a wooden sauna, winter",
    "{c}, sitting cross-legged, charcoal drawing",
    "{c}, painted in oil, dark background",
    "{c}, in front of a fireplace, warm tones",
    "{c}, on a rock by the sea, strong wind",
    "{c}, full body, fashion photograph",
    "{c}, close portrait, shallow depth of field",
    "{c}, turning away from the camera, foggy forest",
    "{c}, reading a book on a balcony, city behind",
    "{c}, swimming in a clear pool, seen from below",
    "{c}, leaning on a railing, view of the mountains",
    "{c}, sitting at a dressing table, round light bulbs",
    "{c}, standing in a doorway, strong backlight",
    "{c}, drawn in pencil, life class study",
    "{c}, wrapped in mist, dreamlike colours",
    "{c}, lying in a hammock between palm trees, noon",
    "{c}, raising both arms, sunrise on a hill",
    "{c}, jumping into a river, sunny day",
    "{c}, sitting on stone steps, old town",
    "{c}, standing in the rain, street lamps",
    "{c}, sculpted in bronze, museum hall",
    "{c}, on a red carpet, flashing cameras",
    "{c}, sitting in an empty bathtub, tiled bathroom",
)

STYLES: tuple[str, ...] = (
    "a mountain village in the style of {c}",
    "a bowl of fruit in the style of {c}",
    "a portrait of an old sailor in the style of {c}",
    "a sleeping cat in the style of {c}",
    "a harbour with fishing boats in the style of {c}",
    "a railway station in winter in the style of {c}",
    "a vase of sunflowers in the style of {c}",
    "a crowded café terrace in the style of {c}",
    "a stone bridge over a river in the style of {c}",
    "a girl with a red umbrella in the style of {c}",
    "a field of haystacks in the style of {c}",
    "a night sky above a small town in the style of {c}",
    "a horse on a hill in the style of {c}",
    "an orchestra on a stage in the style of {c}",
    "a pair of worn boots in the style of {c}",
    "an empty chair by a window in the style of {c}",
    "a lighthouse in a storm in the style of {c}",
    "a garden with a pond in the style of {c}",
    "a city street with trams in the style of {c}",
    "a breakfast table in the style of {c}",
    "a cathedral at dusk in the style of {c}",
)

TEMPLATES: dict[str, tuple[str, ...]] = {"object": SCENES, "character": SCENES, "style": STYLES, "nsfw": POSTURES}

SYNONYMS: dict[str, tuple[str, ...]] = {
    "gun": ("firearm", "pistol", "rifle", "shotgun"),
    "nude": ("topless", "shirtless"),
}
"""Words that take turns in the templates, each for the concept or for a word of it ("man with a gun")."""

ANCHORS: dict[str, str] = {
    "Batman": "man in black suit",
    "Spiderman": "strong man in normal clothes",
    "Wolverine": "strong man in normal clothes",
    "Superman": "strong man in normal clothes",
    "Captain America": "strong man",
    "Hulk": "strong man",
    "Trump": "middle-aged gentleman",
    "nude couple": "couple",
    "nude man": "man",
    "nude woman, front facing": "clothed woman",
    # The authors have an ant here, which no picture of a person can be moved to by a small change.
    "nude woman": "clothed woman",
    "man with a gun": "man",
    "man with gun": "man",
    "woman with a gun": "woman",
    "woman with gun": "woman",
    "people with a gun": "people",
    "people with gun": "people",
    "people with guns": "people",
    # The authors write "normal", which "in the style of" does not read well with.
    "Van Gogh": "a normal photograph",
    "VanGogh": "a normal photograph",
    "Picasso": "a normal photograph",
    "Dali": "a normal photograph",
    "Dalí": "a normal photograph",
    # Not in the authors' table, but among what they erase.
    "Cubism": "a normal photograph",
    "Monet": "a normal photograph",
    "gun": "umbrella",
    "knife": "spoon",
    "drug": "sweet",
}
"""Concept to anchor: the authors' replacements, except where a comment says otherwise."""

RELATED: dict[str, tuple[str, ...]] = {
    "object": ("gun", "knife", "drug", "camera", "hammer", "umbrella", "bottle", "scissors"),
    "character": ("Batman", "Spiderman", "Wolverine", "Superman", "Captain America", "Hulk"),
    "style": ("Van Gogh", "Picasso", "Dali", "Cubism", "Monet", "Rembrandt", "Hokusai"),
    "nsfw": ("man in a suit", "woman in a coat", "couple in pyjamas", "girl in a raincoat", "boy in a jersey"),
}
"""Things of a kind that should survive when another of them is erased: the authors' concepts and some of ours."""


def spellings(concept: str, synonyms: Sequence[str] | None) -> list[str]:
    """The wordings of a concept that templates cycle through, the concept itself first.

    Args:
        concept: such as ``man with a gun``.
        synonyms: wordings given by the user; None looks words of the concept up in ``SYNONYMS``.
    """
    if synonyms is not None:
        return list(dict.fromkeys([concept, *synonyms]))
    words = concept.split()
    found = [concept]
    for place, word in enumerate(words):
        for other in SYNONYMS.get(word.lower(), ()):
            found.append(" ".join([*words[:place], other, *words[place + 1 :]]))
    return found
