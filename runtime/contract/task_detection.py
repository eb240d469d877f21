"""Detects the task of free user text. Politeness ("can you", "please") and indirect
questions ("tell me how many …") are looked through, white space is folded, and a
question needs no question mark. What fits no rule is chat.
"""

from __future__ import annotations

import re

__all__ = ["detect_task"]


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(text, re.IGNORECASE)


_PICTURE = r"(?:the|this|that|my) (?:image|picture|photo|photograph|pic|scene)"
_OPENING = _pattern(
    r"(?:please,?|kindly|(?:can|could|would|will) you(?: please)?(?! (?:see|spot|read|say|identify"
    r"|recogni[sz]e)\b)|i(?: want|'d like| would like) (?:you )?to(?: know)?"
    r"|do you know(?= (?:how|what|who|whose|which|where|when|why|whether|if)\b)|"
    r"(?:tell|show|let) me(?: know)?|find out|figure out|determine|check) "
)  # what may come before the request itself, repeatedly
_MOST_OPENINGS = 4

_DESCRIBE = (
    _pattern(r"(?:describe|caption|summari[sz]e)\b"),
    _pattern(r"(?:give|write|generate)(?: me)? an? (?:short |brief )?(?:caption|description)\b"),
    _pattern(
        r"what(?: is|'s| are| can be seen| (?:(?:do|can) )?(?:you|we|i) see)"
        rf"(?: shown| visible| depicted)?(?: (?:in|on) {_PICTURE})?$"
    ),
    _pattern(rf"what does {_PICTURE} (?:show|depict)$"),
)
_BARE_WHAT = _pattern(r"what(?: is|'s| are)$")
_PROPERTY = (
    r"(?:number|amount|count|colou?r|shape|size|name|type|kind|age|brand|material) (?:of|for)"
)
_LOCATE = (
    _pattern(
        r"(?:where(?: is|'s| are)|locate|find(?: me)?|point (?:to|at)|ground|detect"
        r"|where can i (?:find|see)) (?:the |an? )?(.+)"
    ),
    _pattern(r"(?:show(?: me)?|highlight|mark) the (.+)"),
    _pattern(
        r"(?:(?:give(?: me)?|draw|put|what is|what's|what are) )?(?:an? |the )?(?:bounding box"
        r"|box|coordinates|location|position)(?:es)? (?:of|for|around) (?:the |an? )?(.+)"
    ),
    _pattern(r"where the (.+) (?:is|are)"),
)
_NO_PHRASE = _pattern(
    r"(?:out|how|what|why|when|where|who|whether|if|which|way to|ways)\b"
    r"|(?:difference|differences|reason|meaning|cause|answer)\b"
    rf"|{_PROPERTY}\b|(?:caption|title|word|description) (?:for|of)\b"
    r"|(?:this|that|i|these|those)$|(?:it|he|she|they|we|you)\b"
    r"|.+ (?:taken|going|looking|heading|headed|facing|pointing|from|relative to .+"
    r"|compared to .+)$"
)
_INSIDE_PICTURE = _pattern(rf" (?:in|on|inside) {_PICTURE}$")

_VERBS = r"is|are|was|were|does|do|did|can|could|has|have|had|will|would|should"
_INSIDE = rf"(?:in {_PICTURE},? )?"
_ASKS = _pattern(rf"{_INSIDE}(?:what|how|which|who|whose|why|when|where|{_VERBS})\b")
_ASKS_UNMARKED = (
    _pattern(rf"{_INSIDE}(?:what\b(?! an? )|(?:which|whose|who|why)\b)"),
    _pattern(
        rf"{_INSIDE}how (?:many|much|old|tall|big|large|small|long|high|far|wide|heavy|{_VERBS})\b"
    ),
    _pattern(rf"{_INSIDE}(?:when|where) (?:{_VERBS})\b"),
    _pattern(
        rf"{_INSIDE}(?:is|are|was|were|does|did|has|can|could|would|should) (?:there|the|this|that"
        r"|it|these|those|any|an?|he|she|they|you|someone|anyone|people|all|both|his|her)\b"
    ),
    _pattern(r"(?:do|have) (?:they|these|those|you see|any|all)\b"),
    _pattern(r"(?:whether|if) (?=[^,]+$).+ (?:is|are|was|were|has|have)\b"),
    _pattern(rf"(?:(?:find|give(?: me)?|state|name) )?(?:the )?{_PROPERTY} "),
    _pattern(r"(?:count|name|read) (?:the|all|every)\b"),
)
_WANTS_SENTENCES = _pattern(
    r".*(?:[.?!;] \S|\b(?:explain|in detail|step by step|story|poem|essay|sentences?)\b)"
)


def detect_task(text: str) -> tuple[str, str]:
    """Chooses the task for free user text and returns (task name, text to render).

    "where is the red circle?" gives ("ground", "red circle"), "describe ..." gives a
    caption, a question gives VQA with a question mark, as in training, and anything
    else gives chat with the text as given.
    """
    folded = " ".join(text.split())  # also keeps the regular expressions linear in time
    asked = folded
    for _ in range(_MOST_OPENINGS):
        if task := _task(asked):
            return task
        if (opening := _OPENING.match(asked)) is None:
            break
        asked = asked[opening.end() :].removesuffix("?").rstrip()
    return "chat", text


def _task(folded: str) -> tuple[str, str] | None:
    """Returns the task of text without its opening, or None if it is chat so far."""
    bare = folded.rstrip("?!. ")
    if phrase := _phrase(bare):
        return "ground", phrase
    asks = _ASKS.match(folded)
    marked = f"{bare}?" if asks else folded
    if not _BARE_WHAT.match(bare) and any(rule.match(bare) for rule in _DESCRIBE):
        return "caption", marked
    if folded.endswith("?"):
        if asks and not _OPENING.match(folded):
            return "vqa", marked
    elif any(rule.match(bare) for rule in _ASKS_UNMARKED) and not (
        _WANTS_SENTENCES.match(bare) or _OPENING.match(folded)
    ):
        return "vqa", marked
    return None


def _phrase(bare: str) -> str:
    """Returns the phrase of a request to locate something; empty if it is none."""
    for rule in _LOCATE:
        if (match := rule.fullmatch(bare)) is None:
            continue
        phrase = _INSIDE_PICTURE.sub("", match.group(1))
        return "" if _NO_PHRASE.match(phrase) else phrase
    return ""
