"""The things a prompt names, each with its attributes: what T2I-CompBench asks about one by one."""

from __future__ import annotations

import re

# Words at which a noun phrase ends: prepositions, conjunctions, auxiliaries, pronouns.
_BREAKS = frozenset(
    """and or but nor while as because so that which who whose where when then than if
    of in on at by with without from to into onto over under above below behind beside besides between among near next
    through across along around against inside outside beneath underneath atop toward towards upon within during after
    before for about like up down off out
    is are was were be been being am has have had having do does did can could will would shall should may might must not
    it its he she they them him his her hers their theirs we us our you your i me my there here this these
    those""".split()  # noqa: SIM905
)
# Verbs that such prompts use; at the start or after a determiner the same word is a thing, as in "a fly".
_VERBS = frozenset(
    """sits sit sat stands stand stood lies lay lays hangs hang hung holds hold held wears wear wore rests rest rested
    grows grow grew flies fly flew runs run ran walks walk walked looks look looked eats eat ate drinks drank
    plays played rides rode reads read carries carry carried faces faced surrounds surrounded covers covered contrasts
    contrasted leans lean leaned stretches stretched casts cast swims swam jumps jumped shines shone sleeps slept made
    left""".split()  # noqa: SIM905
)
_DETERMINERS = frozenset("a an the some several many few two three four five six seven eight nine ten one".split())  # noqa: SIM905
_BE = frozenset("is are was were be been being".split())  # noqa: SIM905
_ING_NOUNS = frozenset(
    """building buildings painting paintings ceiling string earring earrings clothing railing awning frosting icing bedding
    morning evening wedding pudding dumpling dumplings duckling sapling herring lightning spring swing sling""".split()  # noqa: SIM905
)
_PLACES = frozenset(["top", "side", "front", "back", "bottom", "left", "right", "middle", "center"])  # "on the left of"


def by_rule(prompt: str) -> list[str]:
    """Find noun phrases by a light rule, in order, with their articles, as spaCy's noun chunks have them.

    A phrase is a run of words between determiners, punctuation and `_BREAKS`; a participle in -ing ends it too, as in "a cat
    sitting on a chair" or "is holding". Made for captions such as "a red book and a yellow vase"; free prose needs spaCy.
    """
    phrases: list[str] = []
    for piece in re.split(r"[,.;:!?()\"]|\s-\s", prompt.lower()):
        words = [*re.findall(r"[\w'’-]+", piece), "and"]
        run: list[str] = []
        for before, word, after in zip(["", *words], words, [*words[1:], "and"], strict=False):
            named = any(w not in _DETERMINERS for w in run)
            verb = word in _VERBS and before != "" and before not in _DETERMINERS
            ends = word in _BREAKS or verb or _is_participle(before, word, after, named)
            if ends or (word in _DETERMINERS and named):
                if named and not _PLACES.issuperset(set(run) - _DETERMINERS):
                    phrases.append(" ".join(run))
                run = []
            if not ends:
                run.append(word)
    return phrases


def _is_participle(before: str, word: str, after: str, named: bool) -> bool:
    """Whether a word in -ing stands for what something does, not for a thing or what it is like."""
    if not word.endswith("ing") or len(word) < 6 or word in _ING_NOUNS:
        return False
    return before in _BE or (named and (after in _BREAKS or after in _DETERMINERS))


class BySpacy:
    """Noun chunks of a spaCy pipeline, as T2I-CompBench has them. Raises ``ValueError`` where one is missing."""

    def __init__(self, pipeline: str = "en_core_web_sm") -> None:
        try:
            import spacy

            self._nlp = spacy.load(pipeline)
        except ImportError:
            raise ValueError("spaCy is not installed: pip install fastloop[spacy], or set noun_phrases to rule") from None
        except OSError:
            raise ValueError(f"spaCy has no {pipeline}: python -m spacy download {pipeline}") from None

    def __call__(self, prompt: str) -> list[str]:
        """Find the noun chunks of a prompt, in lower case."""
        return [chunk.text.lower() for chunk in self._nlp(prompt).noun_chunks]
