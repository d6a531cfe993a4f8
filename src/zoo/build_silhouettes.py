"""Make the ``silhouettes`` data set from the icons of two Python packages.

Run once, by hand, when the list of icons changes; the packages are only read, never imported::

    pip download --no-deps qtawesome==1.4.2 simpleicons==7.21.0
    python -m safelight.zoo.build_silhouettes qtawesome-1.4.2-py3-none-any.whl simpleicons-7.21.0-py3-none-any.whl

With Pillow 13.0.0 (FreeType 2.14.3, zlib 1.2.13) the archive comes out byte for byte as it ships; other versions may
round the rim of a glyph or pack a picture differently. What is written: ``silhouettes/images.zip`` (1-bit PNG, 112 px,
``<subset>/<source id>.png``, white on black, the longer side fills the frame) and ``silhouettes/index.json``.

An icon is written ``font:name``, with what is done to it after a ``+``: ``fill`` closes its holes, ``bold`` thickens
its lines, ``left`` keeps the leftmost of several parts, ``mirror`` and ``turn`` (by 40 degrees) make another pose of an
icon that has no second drawing, ``plate`` cuts it out of a rounded square.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import zipfile
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from safelight.zoo.build_silhouettes_drawing import DRAWINGS, draw_path

FOLDER = Path(__file__).parent / "silhouettes"
SIDE, FINE = 112, 768  # what is kept and what is drawn, pixels

# Prefix -> (font and charmap in qtawesome, or the package; licence).
SOURCES: dict[str, tuple[str, str, str]] = {
    "mdi": ("materialdesignicons6-webfont-6.9.96", "Material Design Icons 6.9.96 (Pictogrammers)", "Apache-2.0"),
    "fa": ("fontawesome6-solid-webfont-6.7.2", "Font Awesome Free 6.7.2, solid", "CC-BY-4.0"),
    "fab": ("fontawesome6-brands-webfont-6.7.2", "Font Awesome Free 6.7.2, brands", "CC-BY-4.0"),
    "ph": ("phosphor-1.3.0", "Phosphor 1.3.0", "MIT"),
    "ri": ("remixicon-2.5.0", "Remix Icon 2.5.0", "Apache-2.0"),
    "si": ("", "Simple Icons 7.21.0", "CC0-1.0"),
    "own": ("", "drawn for this data set", "Apache-2.0"),
}

IN = {
    "Airplane": "mdi:airplane fa:plane ri:plane-fill",
    "Bicycle": "mdi:bicycle+bold fa:bicycle ph:bicycle-fill",
    "Bird": "mdi:bird fa:dove fa:crow",
    "Bottle": "mdi:bottle-soda fa:wine-bottle fa:bottle-water",
    "Car": "mdi:car fa:car-side mdi:car-side",
    "Cat": "mdi:cat fa:cat ph:cat-fill",
    "Dog": "mdi:dog fa:dog mdi:dog-side",
    "Dolphin": "mdi:dolphin mdi:dolphin+mirror mdi:dolphin+turn",
    "Fork": "mdi:silverware-fork fa:utensils+left ri:restaurant-fill+left",
    "Guitar": "mdi:guitar-acoustic fa:guitar mdi:guitar-electric",
    "Mug": "mdi:coffee fa:mug-hot fa:beer-mug-empty",
    "Panda": "mdi:panda own:panda-face own:panda-sitting",
    "Paper_clip": "mdi:paperclip+bold fa:paperclip mdi:attachment+bold",
    "Sailboat": "mdi:sail-boat fa:sailboat ri:sailboat-fill",
    "Scooter": "mdi:scooter+bold mdi:moped ri:e-bike-2-fill",
    "Teapot": "mdi:kettle mdi:kettle-pour-over own:teapot",
}

LOGO = {
    "Adidas": "si:adidas si:adidas+plate",
    "Amazon": "si:amazon si:amazon+plate",
    "Apple": "si:apple ph:apple-logo-fill",
    "Audi": "si:audi+bold si:audi+plate",
    "BMW": "si:bmw",
    "Mercedes Benz": "si:mercedes+bold",
    "Facebook": "si:facebook ri:facebook-fill",
    "Google": "si:google ph:google-logo-fill",
    "Instagram": "si:instagram ph:instagram-logo-fill",
    "Mcdonalds": "si:mcdonalds si:mcdonalds+plate",
    "Nasa": "si:nasa+bold si:nasa+plate",
    "Nike": "si:nike si:nike+plate",
    "Olympics": "own:rings own:rings+plate",
    "Playstation": "si:playstation si:playstation+plate",
    "Puma": "si:puma si:puma+plate",
    "Reebok": "si:reebok si:reebok+plate",
    "Spotify": "si:spotify ph:spotify-logo-fill",
    "Starbucks": "si:starbucks",
    "Tesla": "si:tesla si:tesla+plate",
    "Telegram": "si:telegram ph:telegram-logo-fill+fill",
    "Ubuntu": "si:ubuntu mdi:ubuntu",
}

ICON = {
    "Animal": """
        mdi: bat bee bird bug butterfly cat cow dog dog-service dog-side dolphin donkey duck elephant fish fishbowl
        google-downasaur horse horse-human horse-variant jellyfish kangaroo koala ladybug owl panda paw penguin pig
        pig-variant rabbit rabbit-variant rodent shark shark-fin sheep snail snake spider spider-thread teddy-bear
        tortoise turtle unicorn unicorn-variant
        fa: bug bugs cat cow crow dog dove dragon fish fish-fins frog hippo horse horse-head kiwi-bird locust mosquito
        otter shrimp spider worm
        fab: octopus-deploy sticker-mule suse wolf-pack-battalion
        ph: bird-fill bug-beetle-fill cat-fill dog-fill fish-fill
        ri: bear-smile-fill""",
    "Face_Emoji": """
        mdi: alien baby-face emoticon emoticon-angry emoticon-confused emoticon-cool emoticon-cry emoticon-dead
        emoticon-devil emoticon-excited emoticon-frown emoticon-happy emoticon-kiss emoticon-lol emoticon-neutral
        emoticon-poop emoticon-sad emoticon-sick emoticon-tongue emoticon-wink halloween ninja skull star-face
        fa: face-angry face-dizzy face-flushed face-frown face-frown-open face-grimace face-grin face-grin-beam
        face-grin-beam-sweat face-grin-hearts face-grin-squint face-grin-squint-tears face-grin-stars face-grin-tears
        face-grin-tongue face-grin-tongue-squint face-grin-tongue-wink face-grin-wide face-grin-wink face-kiss
        face-kiss-beam face-kiss-wink-heart face-laugh face-laugh-beam face-laugh-squint face-laugh-wink face-meh
        face-meh-blank face-rolling-eyes face-sad-cry face-sad-tear face-smile face-smile-beam face-smile-wink
        face-surprise face-tired
        ph: smiley-blank-fill smiley-fill smiley-meh-fill smiley-nervous-fill smiley-sad-fill smiley-sticker-fill
        smiley-wink-fill smiley-x-eyes-fill
        ri: emotion-2-fill emotion-fill emotion-happy-fill emotion-laugh-fill emotion-normal-fill emotion-sad-fill
        emotion-unhappy-fill ghost-2-fill""",
    "Music": """
        mdi: album amplifier bell boombox bugle cassette disc-player earbuds equalizer file-music folder-music
        guitar-acoustic guitar-electric guitar-pick headphones headphones-box headset instrument-triangle metronome
        microphone microphone-variant music music-accidental-flat music-accidental-natural music-accidental-sharp
        music-box music-circle music-clef-alto music-clef-bass music-clef-treble music-note music-note-eighth-dotted
        music-note-half music-note-quarter music-note-sixteenth music-note-sixteenth-dotted music-rest-eighth
        music-rest-quarter music-rest-sixteenth piano playlist-music radio record-player saxophone speaker
        speaker-multiple speaker-wireless trumpet violin volume-high
        fa: bell bullhorn compact-disc drum drum-steelpan file-audio guitar headphones headset microphone
        microphone-lines music radio record-vinyl volume-high
        ph: bell-fill disc-fill headphones-fill megaphone-fill microphone-fill music-note-fill music-notes-fill
        radio-fill
        ri: mic-2-fill music-2-fill speaker-3-fill""",
    "Sport": """
        mdi: badminton baseball baseball-bat basketball basketball-hoop bike billiards bow-arrow bowling boxing-glove
        bullseye cricket curling diving diving-flippers diving-scuba dumbbell fencing football football-australian
        football-helmet golf golf-tee gymnastics handball hiking hockey-puck hockey-sticks jump-rope kabaddi karate
        kayaking kettlebell kitesurfing medal parachute podium racing-helmet racquetball roller-skate rollerblade
        rowing rugby run skate skateboarding ski ski-cross-country ski-water sledding snowboard soccer stadium surfing
        swim table-tennis tennis tennis-ball trophy volleyball water-polo weight-lifter whistle yoga
        fa: football futbol medal person-running person-skating person-skiing person-snowboarding person-swimming
        table-tennis-paddle-ball trophy volleyball weight-hanging""",
    "Stationary": """
        mdi: archive book book-open-page-variant book-open-variant bookshelf box-cutter brush brush-variant calculator
        calendar clipboard clipboard-text content-cut desk-lamp draw email eraser feather file-cabinet file-document
        folder folder-open format-paint fountain-pen fountain-pen-tip grease-pencil lead-pencil magnify marker
        math-compass note notebook palette paperclip pen pencil pencil-ruler pin postage-stamp printer ruler
        ruler-square scissors-cutting set-square stamper tag tape-measure typewriter
        fa: book book-open bookmark calendar-days compass-drafting envelope-open-text eraser highlighter marker
        newspaper paintbrush paperclip pen pen-fancy pen-nib pencil ruler ruler-combined scissors scroll stamp stapler
        tape thumbtack
        ph: books-fill paint-brush-fill pen-nib-straight-fill
        ri: scissors-2-fill""",
    "Vehicle": """
        mdi: airballoon airplane ambulance atv bicycle+bold bicycle-cargo+bold bicycle-penny-farthing bulldozer bus
        bus-double-decker bus-side car car-convertible car-estate car-lifted-pickup car-pickup car-side car-sports
        caravan dump-truck excavator ferry fire-truck forklift go-kart golf-cart gondola helicopter human-scooter moped
        motorbike quadcopter rickshaw rocket rocket-launch sail-boat scooter+bold snowmobile submarine tank
        tanker-truck taxi tow-truck tractor tractor-variant train train-car-caboose tram tram-side truck
        truck-cargo-container ufo van-passenger wheelchair
        fa: baby-carriage cable-car car-side ferry helicopter jet-fighter jet-fighter-up motorcycle plane
        plane-departure rocket sailboat ship shuttle-space sleigh snowplow tractor train-subway truck-monster
        truck-pickup van-shuttle
        ri: ship-2-fill""",
}  # fmt: skip

# As the official release spells and orders them.
SCENES = {
    "simple": ["Ocean", "Origami", "Forest", "Cloud", "Sand_dune"],
    "complex": ["Medieval_Village", "City", "Underwater_ruins", "Museum", "Bazaar_market", "Time_square"],
}


def icons(text: str) -> list[str]:
    """``font:name+change`` entries of a list; a word that ends in a colon names the font of those that follow."""
    font, found = "", []
    for word in text.split():
        if word.endswith(":"):
            font = word
        else:
            found.append(word if ":" in word else font + word)
    return found


class Drawer:
    """Draws icons out of the two wheels.

    Args:
        qtawesome, simpleicons: the wheels.
    """

    def __init__(self, qtawesome: Path, simpleicons: Path) -> None:
        self.fonts: dict[str, tuple[ImageFont.FreeTypeFont, dict[str, str]]] = {}
        with zipfile.ZipFile(qtawesome) as wheel:
            for prefix, (font, _, _) in SOURCES.items():
                if font:
                    letters = wheel.read(f"qtawesome/fonts/{font}.ttf")
                    stem, _, version = font.rpartition("-")
                    charmap = json.loads(wheel.read(f"qtawesome/fonts/{stem}-charmap-{version}.json"))
                    self.fonts[prefix] = (ImageFont.truetype(io.BytesIO(letters), FINE), charmap)
        with zipfile.ZipFile(simpleicons) as wheel:
            source = wheel.read("simpleicons/icons.py").decode()
        self.paths = dict(re.findall(r'slug="(\w+)",.*?<path d="([^"]+)"', source, re.DOTALL))

    def draw(self, icon: str) -> Image.Image:
        """An icon, white on black, (112, 112), 1 bit; its longer side fills the frame."""
        (prefix, _, name), changes = icon.partition("+")[0].partition(":"), icon.split("+")[1:]
        if prefix == "own":
            picture = DRAWINGS[name](FINE)
        elif prefix == "si":
            picture = draw_path(self.paths[name], 24, FINE)
        else:
            font, charmap = self.fonts[prefix]
            letter = chr(int(charmap[name], 16))
            left, top, right, bottom = font.getbbox(letter)
            picture = Image.new("L", (round(right - left), round(bottom - top)))
            ImageDraw.Draw(picture).text((-left, -top), letter, 255, font=font)
        picture = fit(picture, FINE)
        for change in changes:
            picture = fit(CHANGES[change](picture), FINE)
        return fit(picture, SIDE).point(lambda value: 255 * (value >= 128)).convert("1", dither=Image.Dither.NONE)


def fit(picture: Image.Image, side: int) -> Image.Image:
    """Cut away empty borders and centre what is left in a square it touches."""
    picture = picture.crop(picture.getbbox())
    scale = side / max(picture.size)
    width, height = (max(1, round(edge * scale)) for edge in picture.size)
    square = Image.new("L", (side, side))
    square.paste(picture.resize((width, height), Image.Resampling.BOX), ((side - width) // 2, (side - height) // 2))
    return square


def fill(picture: Image.Image) -> Image.Image:
    """Close every hole: what a flood from outside does not reach is inside."""
    outside = ImageOps.expand(picture.point(lambda value: 255 * (value >= 128)), 1, 0)
    ImageDraw.floodfill(outside, (0, 0), 128)
    return ImageOps.crop(outside.point(lambda value: 255 * (value != 128)), 1)


def left(picture: Image.Image) -> Image.Image:
    """Keep the part that reaches farthest to the left."""
    solid = picture.point(lambda value: 255 * (value >= 128))
    column = solid.crop((0, 0, solid.getbbox()[0] + 1, solid.height))  # type: ignore[index]  # never empty
    ImageDraw.floodfill(solid, (column.getbbox()[0], column.getbbox()[1]), 128)  # type: ignore[index]
    return solid.point(lambda value: 255 * (value == 128))


def plate(picture: Image.Image) -> Image.Image:
    """Cut the drawing, at 70 % of its size, out of a rounded square."""
    square = Image.new("L", picture.size)
    ImageDraw.Draw(square).rounded_rectangle((0, 0, FINE - 1, FINE - 1), FINE // 6, 255)
    inside = ImageOps.expand(fit(picture, round(0.7 * FINE)), (FINE - round(0.7 * FINE)) // 2 + 1, 0)
    return ImageChops.subtract(square, inside.crop((0, 0, FINE, FINE)))


CHANGES = {
    "fill": fill,
    "bold": lambda picture: ImageOps.expand(picture, 20, 0).filter(ImageFilter.MaxFilter(17)),
    "left": left,
    "mirror": ImageOps.mirror,
    "turn": lambda picture: picture.rotate(-40, Image.Resampling.BICUBIC, expand=True),
    "plate": plate,
}


def main() -> None:
    """Read both wheels and write the data set."""
    parser = argparse.ArgumentParser(description="make the silhouettes data set from two wheels with icons")
    parser.add_argument("qtawesome", type=Path)
    parser.add_argument("simpleicons", type=Path)
    arguments = parser.parse_args()
    drawer = Drawer(arguments.qtawesome, arguments.simpleicons)
    FOLDER.mkdir(exist_ok=True)
    subsets = {"Illusion_IN": IN, "Illusion_LOGO": LOGO, "Illusion_ICON": ICON}
    rows: dict[str, list[dict[str, str]]] = {subset: [] for subset in subsets}
    with zipfile.ZipFile(FOLDER / "images.zip", "w", zipfile.ZIP_STORED) as images:
        for subset, lists in subsets.items():
            for shape, icon in ((shape, icon) for shape, text in lists.items() for icon in icons(text)):
                # "-" separates the parts of the official file names, so an id must do without.
                source_id = re.sub(r"\W", "_", icon)
                licence = SOURCES[icon.partition(":")[0]][2]
                rows[subset].append({"shape": shape, "source_id": source_id, "icon": icon, "licence": licence})
                png = io.BytesIO()
                drawer.draw(icon).save(png, "PNG", optimize=True)
                # A fixed date: the same inputs give the same archive.
                images.writestr(zipfile.ZipInfo(f"{subset}/{source_id}.png", (2026, 1, 1, 0, 0, 0)), png.getvalue())
    write_index(rows, {subset: list(lists) for subset, lists in subsets.items()})


def write_index(rows: dict[str, list[dict[str, str]]], classes: dict[str, list[str]]) -> None:
    """Write ``index.json``: classes, scenes and packages, then one silhouette a line."""
    parts = [f'"classes": {json.dumps(classes)}', f'"scenes": {json.dumps(SCENES)}']
    parts.append(f'"packages": {json.dumps({prefix: package for prefix, (_, package, _) in SOURCES.items()})}')
    lists = [f'"{subset}": [\n' + ",\n".join(map(json.dumps, found)) + "\n]" for subset, found in rows.items()]
    parts.append('"silhouettes": {\n' + ",\n".join(lists) + "\n}")
    (FOLDER / "index.json").write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
