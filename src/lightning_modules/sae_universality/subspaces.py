"""Features of one concept, by the words at which they are most active (arXiv 2410.06981, its notebooks)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

KEYWORDS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "time": """
            day night week month year hour minute second now soon later early late morning evening noon midnight dawn
            dusk past present future before after yesterday today tomorrow next previous instant era age decade century
            millennium moment pause wait begin start end finish stop continue forever constant frequent occasion season
            spring summer autumn fall winter anniversary deadline schedule calendar clock duration interval epoch
            generation period cycle timespan shift quarter term phase lifetime timeline delay prompt timely recurrent
            daily weekly monthly yearly annual biweekly timeframe""",
        "calendar": """
            day night week month year hour minute second morning evening noon midnight dawn dusk yesterday today
            tomorrow decade century millennium season spring summer autumn fall winter calendar clock daily weekly
            monthly yearly annual biweekly timeframe""",
        "people": """
            man girl boy kid dad mom son sis bro chief priest king queen duke lord friend clerk coach nurse doc maid
            clown guest peer punk nerd jock""",
        "nature": """
            tree grass stone rock cliff hill dirt sand mud wind storm rain cloud sun moon leaf branch twig root bark
            seed tide lake pond creek sea wood field shore snow ice flame fire fog dew hail sky earth glade cave peak
            ridge dust air mist heat""",
        "emotions": """
            joy glee pride grief fear hope love hate pain shame bliss rage calm shock dread guilt peace trust scorn
            doubt hurt wrath laugh cry smile frown gasp blush sigh grin woe spite envy glow thrill mirth bored cheer
            charm grace shy brave proud glad mad sad tense free kind""",
        "month_names": """
            january february march april may june july august september october november december""",
        "countries": """
            usa canada brazil mexico germany france italy spain uk australia china japan india russia korea argentina
            egypt iran turkey""",
        "biology": """
            gene dna rna virus bacteria fungus brain lung blood bone skin muscle nerve vein organ evolve enzyme protein
            lipid membrane antibody antigen ligand substrate receptor cell chromosome nucleus cytoplasm""",
    }.items()
}
"""Words of each concept, in small letters as they are compared."""

_DROPPED = str.maketrans("", "", ".,?!\n")


def window_text(texts: Sequence[str], place: int) -> str:
    """The text of the tokens from two before a place to one after it.

    Args:
        texts: (T,), the tokens of a document as text.
        place: of the token at which a feature is active.
    """
    return "".join(texts[max(place - 2, 0) : place + 2])


def names_concept(token: str, window: str, keywords: Collection[str]) -> bool:
    """Whether a token is a keyword and stands as a word of its own in the text around it.

    Args:
        token: as text; spaces and capitals do not matter.
        window: the text around it, see :func:`window_text`.
        keywords: in small letters.
    """
    word = token.replace(" ", "").lower()
    return word in keywords and word in window.lower().translate(_DROPPED).split(" ")


def features_of_concept(
    top_tokens: Sequence[Sequence[str]], windows: Sequence[Sequence[str]], keywords: Collection[str]
) -> list[int]:
    """Features of which at least one top token names the concept (:func:`names_concept`), in order.

    Args:
        top_tokens: of each feature the tokens at which it is most active (reference: five).
        windows: the text around each of them.
        keywords: see ``KEYWORDS``.
    """
    return [
        feature
        for feature, (tokens, texts) in enumerate(zip(top_tokens, windows, strict=True))
        if any(names_concept(token, text, keywords) for token, text in zip(tokens, texts, strict=True))
    ]
