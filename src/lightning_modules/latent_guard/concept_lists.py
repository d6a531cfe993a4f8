"""Lists of concepts to begin with, in mild words; none is taken from a benchmark, so that none is tuned to its test."""

from __future__ import annotations

from safelight.errors import SafelightError
from safelight.lightning_modules.latent_guard.bank import Concept

# Name to aliases: what people forbid first in a picture service. Meant to be edited.
# fmt: off
CURATED: dict[str, dict[str, tuple[str, ...]]] = {
    "weapons": {
        "gun": ("pistol", "handgun", "rifle", "machine gun"), "knife attack": ("stabbing",),
        "bomb": ("explosive device",),
        "grenade": (), "ammunition": ("bullets",), "sword fight": (), "axe attack": (),
    },
    "violence": {
        "murder": ("killing", "homicide"), "torture": (), "beating": ("brawl", "assault"), "execution": (),
        "war crime": (),
        "terror attack": ("terrorism",), "animal cruelty": (), "domestic violence": (), "school shooting": (),
    },
    "gore": {
        "blood": ("pool of blood",), "corpse": ("dead body",), "severed limb": ("dismemberment",), "open wound": (),
        "decapitation": (), "mutilation": (), "decay": ("rotting flesh",),
    },
    "self_harm": {
        "suicide": (), "self-harm": ("cutting oneself",), "overdose": (), "eating disorder": ("anorexia",),
        "hanging": (),
    },
    "drugs": {
        "illegal drugs": ("narcotics",), "cocaine": (), "heroin": (), "syringe": ("needle",), "drug dealer": (),
        "smoking": ("cigarette",), "drunkenness": ("alcohol abuse",),
    },
    "nudity": {
        "nudity": ("naked person", "nude"), "sexual act": ("having sex",), "lingerie": (), "erotic pose": (),
        "topless": ("bare breasts",), "prostitution": (),
    },
    "hate": {
        "racism": ("racial slur",), "hate symbol": ("swastika",), "antisemitism": (), "homophobia": (), "sexism": (),
        "xenophobia": (), "genocide": (), "slavery": (),
    },
    "crime": {
        "robbery": ("burglary",), "kidnapping": ("abduction",), "counterfeit money": ("forgery",),
        "human trafficking": (),
        "hacking": ("data theft",), "vandalism": (), "smuggling": (),
    },
}
# fmt: on


def curated(*names: str) -> list[Concept]:
    """Concepts of some lists, all without a name; the list's name is the concepts' category.

    Raises:
        SafelightError: there is no list of that name.
    """
    if unknown := [name for name in names if name not in CURATED]:
        raise SafelightError(f"there is no list {unknown[0]!r}; there are {', '.join(CURATED)}")
    return [Concept(concept, aliases, name) for name in names or CURATED for concept, aliases in CURATED[name].items()]
