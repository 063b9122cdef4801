"""Finding the answer in what a model writes."""

import re
from collections.abc import Iterable, Iterator

from ..data.reasoning_sources import last_boxed
from .answer_values import NOT_UNITS, NUMBER, number_value, plain, value_of, without_delimiters

_SENTENCE = re.compile(r"(?:[^.!?\n]|[.!?](?=\S))+")
_END = re.compile(r"[\s.*]*\Z")
_LONGEST_ANSWER = 1000  # characters; bounds the time for models that repeat themselves
# Not "the third answer" or "24 points/answer": those are about something else.
_THE_ANSWER = (
    r"(?:\b(?:the|my|our)\s+(?:(?:final|correct|right|exact)\s+)?|\b(?:final|correct)\s+|(?:^|[.!?:,\n*#])[ \t]*)"
    r"answer\b(?![^.:=\n]{0,40}\b(?:first|second|third|previous|next)\b)"
)
_ANSWER_IS = re.compile(
    rf"{_THE_ANSWER}[^.:=\n]{{0,80}}?"
    r"(?:\b(?:is|equals|would be|will be|should be|becomes)\b(?!\s+not\b|n't)|=)[\s:*_]*",
    re.IGNORECASE,
)
_ANSWER_COLON = re.compile(
    rf"(?:{_THE_ANSWER}|\bresult\b)[*_\s]*(?:\([^()\n]*\)\s*)?[*_]*:[\s*_]*|{_THE_ANSWER}[*_]*[ \t]*\n\s*",
    re.IGNORECASE,
)
_FORMULA = re.compile(
    r"(?<![\w$])\$(?!\s)([^$\n]+?)(?<!\s)\$(?![0-9])|\\\((.+?)\\\)|\\\[(.+?)\\\]|\$\$(.+?)\$\$", re.DOTALL
)
_FILLER = re.compile(
    r"(?:(?:about|approximately|roughly|around|exactly|only|just|simply|equal to|thus|therefore|hence|then|so|still|≈"
    r"|:|,)\s*)+",
    re.IGNORECASE,
)
# What makes more of a number: an operator, a second quantity, a half.
_CONTINUES = re.compile(
    r"(?:\s+[^\W\d_]+){0,3}\s*[+*\u00d7÷^<>=]"
    r"|\s*[-/]\s*[\w(\\]"
    r"|\s*,\s*(?:and\s+)?-?[$]?[0-9]"
    r"|\s*(?:[^\W\d_]+,?\s+)?(?:and|or|to)\s+(?:[$]?-?[0-9]|a\s)"
    rf"|\s*(?:π|(?!(?:and|or|to)\b){NOT_UNITS})"
)


def extract_answer(text: str) -> str | None:
    r"""
    The answer a model's output comes to, as written but without currency, unit and decoration; None if there is none.

    The first of these that finds something decides, and of several of its kind the last one, which corrects those
    before it: `\boxed{...}`; `<answer>...</answer>`; `#### ...`, as in GSM8K; "the answer is ..." and "Answer: ...";
    a quantity in bold type in the last line; the last number. Only what follows a closed thought (`</think>`) counts.
    """
    text = text.rpartition("</think>")[2]
    finders = (_boxed, _tagged, _after_hashes, _stated, _bold_in_last_line, _last_number)
    return next((answer for find in finders if (answer := find(text))), None)


def _boxed(text: str) -> str | None:
    answer = last_boxed(text)
    return _whole(answer) if answer and len(answer) <= _LONGEST_ANSWER else None


def _tagged(text: str) -> str | None:
    found = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE)
    return (_boxed(found[-1]) or _in_clause(found[-1])) if found else None


def _after_hashes(text: str) -> str | None:
    """What follows the last `####`; a line that is no quantity and has text below it is a heading."""
    for match in reversed(list(re.finditer(r"####[ \t]*([^\n]*)", text))):
        line = match[1].strip()
        if line and (_leading_quantity(_tidy(line)) or not text[match.end() :].strip()):
            return _in_clause(line)
    return None


def _stated(text: str) -> str | None:
    """What is called the answer; a number rather than a word ("The answer is 18. This answer is correct.")."""
    if "answer" not in text.lower() and "result" not in text.lower():
        return None
    answers: list[str] = []
    for match in sorted([*_ANSWER_IS.finditer(text), *_ANSWER_COLON.finditer(text)], key=lambda match: match.end()):
        clause = _SENTENCE.match(text, match.end(), match.end() + _LONGEST_ANSWER)
        if clause is None:
            continue
        # "Answer:" may introduce reasoning instead.
        is_all = match.re is _ANSWER_IS or _END.match(text, clause.end())
        tidy = _tidy(clause[0])
        if answer := (_in_clause(clause[0]) if is_all or value_of(tidy) else _leading_quantity(tidy)):
            answers.append(answer)
    answers = [answer for answer in answers if value_of(answer)] or answers
    return answers[-1] if answers else None


def _bold_in_last_line(text: str) -> str | None:
    bold = re.findall(r"\*\*(.+?)\*\*", text.strip().rpartition("\n")[2])
    return next((value.text for value in map(value_of, reversed(bold)) if value), None)


def _last_number(text: str) -> str | None:
    text = re.sub(r"(?m)^[ \t]*[0-9]+[.)][ \t]+(?=\S)", "", plain(text))  # without the numbers of lists
    return next(_numbers(reversed(list(NUMBER.finditer(text)))), None)


def _whole(content: str) -> str | None:
    """All of `content`: the number it says without its unit, or itself."""
    content = without_delimiters(plain(content))
    value = value_of(content)
    return value.text if value else content or None


def _in_clause(clause: str) -> str | None:
    """The quantity that a clause leads up to, or the whole of it."""
    formula = _FORMULA.search(clause)
    tidy = _tidy(clause)
    if value := value_of(tidy):
        return value.text
    if leading := _leading_quantity(tidy):
        return leading
    if formula and not any(_numbers(NUMBER.finditer(plain(clause[: formula.start()])))):
        return _whole(next(filter(None, formula.groups())))
    if "=" in tidy and tidy.rpartition("=")[2].strip():
        return _in_clause(tidy.rpartition("=")[2])
    starts_formula = re.match(r"[(\[{\\]|-?[$]?[0-9]", tidy)
    return _whole(tidy) if starts_formula else next(_numbers(NUMBER.finditer(tidy)), None) or _whole(tidy)


def _leading_quantity(clause: str) -> str | None:
    """The number `clause` begins with, unless it is part of something larger."""
    match = NUMBER.match(clause)
    value = match and number_value(match)
    return value.text if match and value and not _CONTINUES.match(clause, match.end()) else None


def _tidy(clause: str) -> str:
    clause = without_delimiters(plain(clause)).strip(" \"'*_")
    filler = _FILLER.match(clause)
    return without_delimiters(clause[filler.end() :] if filler else clause)


def _numbers(matches: Iterable[re.Match[str]]) -> Iterator[str]:
    return (value.text for value in map(number_value, matches) if value)
