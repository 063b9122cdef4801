"""
Comparing answers: as numbers, as mathematics by math-verify, or as text. The grammar of numbers is for what
math-verify does not read: numbers in prose, units, currencies, mixed numbers, multipliers.
"""

import logging
import re
import threading
import unicodedata
from fractions import Fraction
from itertools import accumulate
from typing import Any, NamedTuple

# --- Notation that means nothing ---

_CHARACTERS = str.maketrans({**dict.fromkeys("\u2212\u2013\u2012\u2010\u2011\ufe63\uff0d", "-"), "\u2044": "/"})
_VULGAR = "\u00bc-\u00be\u2150-\u215f\u2189"
_VULGAR_FRACTION = re.compile(f"((?<=[0-9{_VULGAR}]) ?)?([{_VULGAR}])")  # ½, and what parts it from the 2 of 2½
_THIN_SPACES = "\u00a0\u2007\u2009\u202f"
# Rewritten one after the other: how LaTeX, Markdown and typesetting write what plain text says too.
_REWRITES = (
    (rf"(?<=[0-9])(?:\{{,\}}|,?\\[,!]|[{_THIN_SPACES}])(?=[0-9]{{3}}(?![0-9]))", ","),  # 1{,}000  1\,000  1 000
    (rf"[{_THIN_SPACES}]|(?<!\\)\\[,;:! ]|(?<!\\)~", " "),
    (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1"),
    (r"\\(?:left|right|displaystyle|quad)(?![a-zA-Z])", ""),
    (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
    (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree", "°"),
    (r"\\times(?![a-zA-Z])", "\u00d7"),
    (r"\\approx(?![a-zA-Z])", "≈"),
    (r"(?<!\\)\\(?:(?=[$%#&_])|[()\[\]])", ""),
    (r"(?<![0-9)])(?<!\b[a-zA-Z])\*\*|\*\*(?!\(?(?:[0-9]|[a-zA-Z]\b))", ""),  # Markdown's, not that of x**2
    (r"__|`|<<[^<>]*>>", ""),  # <<48/2=24>>: GSM8K's calculator
    (r"\b(?:negative|minus)\s+(?=[$€£¥₹]?[0-9])", "-"),
)

# --- Notation of numbers ---

_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)"
_MULTIPLIERS = {"k": 10**3, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CURRENCY = r"(?:(?:US|CA|AU)?[$€£¥₹]|(?:USD|EUR|GBP|Rs\.?)(?![a-zA-Z]))"
# Units that may stand for themselves or touch the number; one that is not listed has two letters and a space at least.
_SHORT_UNIT = (
    r"(?:[kcm]?m|k?g|mg|lbs?|oz|m?[lL]|h|hrs?|mins?|s|secs?|mph|kph|km/h|m/s|ft|in|yds?|am|pm|°\s?[CF]?|¢|c|€|£|¥)"
    r"(?:\^\{?[23]\}?|[²³])?"
)
# A fraction that is no factor, exponent or index of something else.
_LATEX_FRACTION = re.compile(
    rf"(?<![\^_])((?<=[0-9²³]))?\\frac\s*(?:\{{\s*(-?{_DECIMAL})\s*\}}|([0-9]))\s*(?:\{{\s*(-?{_DECIMAL})\s*\}}|([0-9]))"
    rf"(?!\s*\\[a-zA-Z]|[({{\[^]|(?!{_SHORT_UNIT}(?!\w))(?:[a-zA-Z]|\s+[b-zB-Z](?![a-zA-Z])))"
)
_BODY = rf"""
    (?: (?P<whole>{_INTEGER})[ ](?P<part>[0-9]+/[0-9]+)
      | (?P<over>{_DECIMAL}[ ]?/[ ]?-?{_DECIMAL})
      | (?P<decimal>{_DECIMAL})
        (?: [eE](?P<e>[-+]?[0-9]{{1,3}}) | \s?[\u00d7x*]\s?10\s?\^\s?\{{?(?P<ten>-?[0-9]{{1,3}})\}}? )?
    )
    (?: [ ]?(?P<multiplier>hundred|thousand|million|billion|trillion)\b | (?P<k>[kK])\b )?
    (?P<percent>[ ]?(?:%|percent\b|per[ ]cent\b))?
"""
# A number in running text: not inside a word, date, clock time, range, index, exponent or product.
NUMBER = re.compile(
    rf"""(?<![\w.,^\\])(?<![0-9][-:/,])(?<![\^_]\{{)
    (?P<sign>(?<![)\]}}%])[-+])?(?:{_CURRENCY}\s?)?(?P<inner>-)?(?P<amount>{_BODY})
    (?: (?={_SHORT_UNIT}(?!\w)) | (?![\w^(\\°]|[.,:/-][0-9]|\s?\\) )""",
    re.VERBOSE,
)
_WHOLE_NUMBER = re.compile(rf"(?P<sign>[-+])?\s*(?:{_CURRENCY}\s?)?(?P<inner>-)?\s*(?P<amount>{_BODY})", re.VERBOSE)
# Words that make another number of the one before them.
NOT_UNITS = (
    r"(?:and|or|to|plus|minus|times|over|half|quarter|hundred|thousand|million|billion|trillion|pi|squared|cubed"
    r"|factorial|sqrt|root)\b"
)
# What may follow a number without changing it.
_UNIT = re.compile(
    rf"(?:\s*{_SHORT_UNIT}(?!\w)|\s+(?!{NOT_UNITS})[^\W\d_]{{2,}})?"
    rf"(?:[\s/.()'-]+(?!{NOT_UNITS})[^\W\d_]{{2,}}(?:\^\{{?[23]\}}?|[²³])?)*[\s.)]*",
    re.IGNORECASE,
)
_LONGEST_NUMBER = 300  # characters; what is longer, a model stuck on a digit wrote


class Value(NamedTuple):
    """A number, whether it was written as a percentage (50 for `50%`), and how it was written, but for currency."""

    number: Fraction
    is_percentage: bool
    text: str


def plain(text: str) -> str:
    """`text` without LaTeX, Markdown and typography that changes nothing; fractions as `a/b`."""
    if not text.isascii():
        text = _VULGAR_FRACTION.sub(
            lambda match: ("" if match[1] is None else " ") + unicodedata.normalize("NFKC", match[2]), text
        ).translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    return _LATEX_FRACTION.sub(
        lambda match: ("" if match[1] is None else " ") + f"{match[2] or match[3]}/{match[4] or match[5]}", text
    )


def number_value(match: re.Match[str]) -> Value | None:
    """The number that `NUMBER` matched; None for a division by zero, and for more digits than anyone means."""
    if len(match[0]) > _LONGEST_NUMBER:
        return None

    def exact(text: str) -> Fraction:
        return Fraction(text.replace(",", "").replace(" ", ""))

    if match["decimal"]:
        number = exact(match["decimal"]) * Fraction(10) ** int(match["e"] or match["ten"] or 0)
    else:
        over, _, under = (match["over"] or match["part"]).partition("/")
        if not exact(under):
            return None
        number = exact(over) / exact(under) + exact(match["whole"] or "0")
    if multiplier := match["multiplier"] or match["k"]:
        number *= _MULTIPLIERS[multiplier.lower()]
    is_negative = (match["sign"] == "-") != bool(match["inner"])
    sign = "-" if is_negative else ""
    return Value(-number if is_negative else number, bool(match["percent"]), sign + match["amount"])


def value_of(text: str) -> Value | None:
    """The number a whole answer says, as in `$1,234.50`, `1 1/2`, `50%`, `x = 7` or `18 dollars per day`, or None."""
    text = without_delimiters(plain(text))
    name, equals, right = text.rpartition("=")
    if equals and (re.fullmatch(r"\s*[^\W\d]\w*\s*", name) or not re.search(r"[^\W\d_]", name)):
        text = right.strip()  # x = 7; 3 + 4 = 7
    match = _WHOLE_NUMBER.match(text)
    return number_value(match) if match and _UNIT.fullmatch(text, match.end()) else None


def without_delimiters(text: str) -> str:
    """`text` without the white space, full stop and dollar signs around a formula."""
    text = text.strip().rstrip(".").strip()
    while len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    return text.rstrip(".").strip()


def answers_match(a: str | None, b: str | None) -> bool:
    """
    Whether two answers say the same.

    Numbers are compared exactly, whatever their notation and unit: `1,200` is `$1200.00`, `\\frac{1}{2}` is `0.5`, and
    `0.33` is not `1/3`; `50%` is `50` and `0.5`. Other mathematics (LaTeX, `2*sqrt(3)`, sets, intervals, equations) is
    compared by math-verify, in both directions, and formulas too large for it as text. Texts agree but for case, white
    space, LaTeX commands that only decorate, and the full stop. None or an empty text, no answer, agrees with nothing.

    Raises:
        ImportError: if formulas have to be compared and math-verify is not installed.
    """
    if a is None or b is None:
        return False
    one, other = value_of(a), value_of(b)
    if one is None or other is None:
        return (one is other and _bare_text(a) == _bare_text(b) != "") or _same_mathematics(one or a, other or b)
    if one.is_percentage == other.is_percentage:
        return one.number == other.number
    percentage, bare = (one.number, other.number) if one.is_percentage else (other.number, one.number)
    return bare in (percentage, percentage / 100)


def _bare_text(text: str) -> str:
    text = re.sub(r"\s+", "", without_delimiters(plain(text))).casefold()
    return re.sub(r"^\(([a-z])\)$", r"\1", text)  # a choice: (B)


# --- Mathematics ---

_LONGEST_FORMULA = 200  # characters
_DEEPEST_FORMULA = 5  # brackets: the parser takes twice as long for each
_MOST_BITS = 5000  # of a number that comparing may have to write out: allows 2^{2020} and x^{100}, not 9^{9^9}
_SECONDS = 5
_DOT = r"\cdot "
_SYMBOLS = str.maketrans(
    {"\u03c0": r"\pi ", "·": _DOT, "\u00d7": _DOT, "∞": r"\infty ", "°": r"^\circ ", "²": "^2", "³": "^3"}
)
_FUNCTION = re.compile(r"(?<![\\a-zA-Z])(?=(?:pi|sin|cos|tan|log|ln|exp)(?![a-zA-Z]))")
_IS_FORMULA = re.compile(r"[0-9^+*/=<>\\]")
# Words and H2O, which math-verify reads as products; dates, as fractions; and what could take it too long.
_NO_FORMULA = re.compile(
    r"(?<![\\a-zA-Z])(?!(?:and|sqrt)(?![a-zA-Z]))[a-zA-Z]{3}|(?<![\\a-zA-Z])[a-zA-Z]{1,2}[0-9]"
    r"|(?<![_^0-9])[0-9]+\s+[0-9]|[0-9]\s*/\s*[0-9]+\s*/|\\(?:[dt]?binom|gcd|lcm|sum|prod|i*nt|oint|lim)(?![a-zA-Z])"
)


def _same_mathematics(a: str | Value, b: str | Value) -> bool:
    """Whether math-verify finds two answers equal, at least one of which is not a plain number."""
    formulas = [_formula(answer) for answer in (a, b)]
    if None in formulas:
        return False
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise ImportError("Comparing formulas needs math-verify: pip install 'llada-trm-hf[train]'.") from error
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of every time limit
    # Time limits are signals, which need the main thread. Elsewhere only the limits on size hold.
    seconds = _SECONDS if threading.current_thread() is threading.main_thread() else None
    reading = [LatexExtractionConfig(boxed_match_priority=-1)]
    parsed = [
        parse(f"${formula}$", reading, fallback_mode="no_fallback", parsing_timeout=seconds) for formula in formulas
    ]
    if not all(parsed) or any(_bits(expressions[0]) > _MOST_BITS for expressions in parsed):
        return False
    # Not symmetric by itself: of an equation and a number, it follows the first.
    orders = (parsed, parsed[::-1])
    return all(verify(*order, allow_set_relation_comp=True, timeout_seconds=seconds) for order in orders)


def _formula(answer: str | Value) -> str | None:
    """An answer as LaTeX that is safe to parse; None for text."""
    if isinstance(answer, Value):
        number = str(answer.number)
        return number if len(number) <= _LONGEST_FORMULA else None
    if len(answer) > _LONGEST_FORMULA or _depth(answer) > _DEEPEST_FORMULA:
        return None
    text = re.sub(r"\s+", " ", without_delimiters(plain(answer))).replace("$", "").translate(_SYMBOLS)
    text = re.sub(r"√(?=\s*\()", "sqrt", text).replace("√", r"\sqrt ").replace("**", "^")
    text = _FUNCTION.sub(r"\\", text)
    words = re.sub(r"\\(?:begin|end)\s*\{[a-z]+\}", "", text)
    return text if _IS_FORMULA.search(words) and not _NO_FORMULA.search(words) else None


def _depth(text: str) -> int:
    steps = ((character in "([{") - (character in ")]}") for character in text)
    return max(accumulate(steps), default=0)


def _bits(expression: Any) -> float:
    """A bound on the size of a sympy expression when it is worked out, its powers and factorials included."""
    import sympy

    if isinstance(expression, (sympy.Rational, sympy.Float)):
        return float(max(abs(int(part)).bit_length() for part in expression.as_numer_denom()))
    is_matrix = isinstance(expression, sympy.MatrixBase)
    arguments = [_bits(part) for part in (expression.flat() if is_matrix else expression.args)]
    if isinstance(expression, (sympy.Pow, sympy.exp)):
        base, exponent = expression.as_base_exp()
        if exponent.free_symbols:
            return _bits(base) + _bits(exponent)
        largest = abs(int(exponent)) + 1 if exponent.is_Rational else 2 ** min(_bits(exponent), 60)
        return _bits(base) * min(largest, 2**60)
    if isinstance(expression, (sympy.factorial, sympy.factorial2)):
        return 2 ** min(arguments[0], 60) * arguments[0] if not expression.free_symbols else arguments[0]
    return sum(arguments) or 48.0  # a symbol: as much as its power may become, multiplied out
