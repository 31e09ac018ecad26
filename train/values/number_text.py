"""Parsing numbers as people and programs write them: 1,234.50 or 1.234,50, $7,876.50, 54 %."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

# Texts that programs write for a missing value, in lower case.
MISSING_WORDS = {
    *("", "na", "n/a", "n.a.", "#n/a", "nan", "null", "none", "nil", "nat", "<na>", "(null)"),
    *("0000-00-00", "0000-00-00 00:00:00"),
    *("?", ".", "-", "--", r"\n"),
    *("#div/0!", "#value!", "#ref!", "#num!", "#name?"),
}
DECIMALS = (".", ",")
# Separators of digit groups, in addition to the other decimal mark. The last four are spaces.
SEPARATORS = "'’ \u00a0\u2009\u202f"
MINUS = "-\u2212\u2013"
SYMBOLS = "$€£¥₩₹₽₺₫₴₦₱฿₪¢"
CURRENCIES = (
    *("USD", "EUR", "GBP", "CHF", "JPY", "CNY", "INR", "KRW", "AUD", "CAD", "NZD", "SEK", "NOK"),
    *("DKK", "PLN", "CZK", "HUF", "RON", "TRY", "BRL", "MXN", "ZAR", "SGD", "HKD", "ILS", "THB"),
    *("US$", "A$", "C$", "R$", "Fr.", "kr", "zł", "Kč", "Ft", "Rs.", "Rs"),
)
PERCENT = "%"
# A decimal mark with dashes instead of a fraction, as in 49,- and CHF 5.–
NO_CENTS = re.compile(r"(?<=[0-9])([.,])[-–—]{1,2}(?![0-9])")
_UNIT = "|".join(
    [f"[{re.escape(SYMBOLS + PERCENT)}]"]
    + [re.escape(each) for each in sorted(CURRENCIES, key=len, reverse=True)]
)
# Units of measure follow the number: 70 kg, 5.5 km/h, 21 °C. Letters before it make it a code.
_MEASURE = r"°?[^\W\d_]{1,8}[²³]?(?:/[^\W\d_]{1,4}[²³]?)?|°"
# Longer units lose a plural s, see `_singular`.
SHORT_UNIT = 3
_PARTS = re.compile(
    rf"(?P<outer>[+{re.escape(MINUS)}])?\s*(?P<before>{_UNIT})?\s*(?P<inner>[+{re.escape(MINUS)}])?\s*"
    rf"(?P<digits>[0-9.,{SEPARATORS}]*[0-9][0-9.,]*(?:[eE][+-]?[0-9]+)?)"
    rf"\s*(?P<after>{_UNIT}|{_MEASURE})?(?P<trailing>-)?"
)


@dataclass(frozen=True)
class NumberFormat:
    """How a column writes its numbers.

    decimal: the decimal mark, "." or ",". The other mark, an apostrophe or a space may separate
    groups of three digits.
    unit: a currency or "%" before or after the number, or letters after it, such as kg, in the
    singular. Values may omit it. It does not change the number: 54 % is 54.
    """

    decimal: str = "."
    unit: str = ""

    def parse(self, text: str) -> float:
        """Return the number in a text; infinity for inf, or if it is too large for a float.

        Raises ValueError if the text is not a number, or has another unit, other digits than 0-9 or
        other separators.
        """
        if _is_infinite(text):
            return math.inf
        unit, number = split_unit(text)
        if unit and unit != _singular(self.unit):
            raise ValueError(f"the unit is {unit}")
        return _value(number, self.decimal)

    def parse_all(self, texts: Sequence[str]) -> list[float] | None:
        """Return the numbers in texts by a fast path for plain floats; None if one is not plain."""
        if self.decimal != ".":
            return None
        joined = "".join(texts)
        # float() also accepts 1_000 and digits of other scripts, which `parse` rejects.
        if "_" in joined or not joined.isascii():
            return None
        try:
            return [float(text) for text in texts]
        except ValueError:
            return None


def split_unit(text: str) -> tuple[str, str]:
    """Return the unit of a number, "" if it has none, and its digits, after "-" if negative.

    Raises ValueError if the text is not a number with at most one sign and one unit.
    """
    text = NO_CENTS.sub(r"\g<1>0", text.strip())
    negative = text.startswith("(") and text.endswith(")")  # the accounting format (12.50)
    found = _PARTS.fullmatch(text[1:-1].strip() if negative else text)
    if found is None:
        raise ValueError("not a number")
    signs = [found["outer"], found["inner"], found["trailing"], "-" if negative else None]
    given = [sign for sign in signs if sign]
    if len(given) > 1 or (found["before"] and found["after"]):
        raise ValueError("two signs or units")
    minus = "-" if given and given[0] != "+" else ""
    unit = found["before"] or found["after"] or ""
    return _singular(unit), minus + found["digits"]


def _singular(unit: str) -> str:
    """Return a unit without a plural s: years becomes year."""
    return unit.removesuffix("s") if len(unit) > SHORT_UNIT else unit


def is_measure(unit: str) -> bool:
    """Return whether a unit is a measure such as kg, and not a currency or "%".

    A currency or "%" may be missing from some values of a column; a measure may not.
    """
    return bool(unit) and unit not in {*SYMBOLS, PERCENT, *CURRENCIES}


def most_frequent_format(texts: Sequence[str], decimal: str | None = None) -> NumberFormat:
    """Return the format that reads most of the texts as numbers; some texts may not fit it."""
    read = [found for text in texts if (found := _unit_or_none(text))]
    units = Counter(unit for unit, _ in read if unit)
    unit = max(units, key=lambda each: units[each], default="")

    def count(mark: str) -> int:
        return sum(_read([number], mark) is not None for _, number in read)

    return NumberFormat(decimal or max(DECIMALS, key=count), unit)


def share_of_numbers(texts: Sequence[str]) -> tuple[float, str]:
    """Return the share of texts that are numbers or missing, and the first other text or "".

    Numbers are read in the texts' most frequent format.
    """
    form = most_frequent_format(texts)
    others = [text for text in texts if not _is_number(form, text)]
    return 1 - len(others) / len(texts), others[0] if others else ""


def _is_number(form: NumberFormat, text: str) -> bool:
    try:
        form.parse(text)
    except ValueError:
        return text.strip().lower() in MISSING_WORDS
    return True


def find_format(
    texts: Iterable[str], decimal: str | None = None
) -> tuple[NumberFormat | None, bool]:
    """Return the format that reads all texts as numbers, and whether it is ambiguous.

    It is ambiguous if both decimal marks fit and give different numbers, as for 1,234; then the
    format has the point. None if no format fits: a text is not a number, there are two units, or
    only some texts have a measure. decimal: the only mark to try; both if None.
    """
    units: set[str] = set()
    numbers: list[str] = []
    for text in texts:
        if text.strip().lower() in MISSING_WORDS:
            continue
        found = _unit_or_none(text)
        if found is None:
            if not _is_infinite(text):
                return None, False
            continue
        units.add(found[0])
        numbers.append(found[1])
    if "" in units and any(map(is_measure, units)):
        return None, False  # such as 879 and 7.2K, or house numbers 17 and 17a
    units.discard("")
    if len(units) > 1 or not numbers:
        return None, False
    read = {mark: _read(numbers, mark) for mark in ([decimal] if decimal else DECIMALS)}
    fitting = [mark for mark, values in read.items() if values is not None]
    if not fitting:
        return None, False
    ambiguous = len(fitting) == 2 and read["."] != read[","]
    return NumberFormat(fitting[0], next(iter(units), "")), ambiguous


def _read(numbers: Sequence[str], decimal: str) -> list[float] | None:
    try:
        return [_value(number, decimal) for number in numbers]
    except ValueError:
        return None


def _unit_or_none(text: str) -> tuple[str, str] | None:
    try:
        return split_unit(text)
    except ValueError:
        return None


def _is_infinite(text: str) -> bool:
    return text.strip().lower().lstrip("+-") in ("inf", "infinity")


def _value(number: str, decimal: str) -> float:
    """Return the number in digits with separators. Raises ValueError if they are malformed."""
    found = _digits(decimal).fullmatch(number)
    if found is None:
        raise ValueError("not a number")
    if separator := found["separator"] or found.groupdict().get("comma"):
        number = number.replace(separator, "")
    return float(number.replace(decimal, "."))


@cache
def _digits(decimal: str) -> re.Pattern[str]:
    other = "," if decimal == "." else "."
    groups = rf"[1-9][0-9]{{0,2}}(?P<separator>[{other}{SEPARATORS}])[0-9]{{3}}"
    groups += r"(?:(?P=separator)[0-9]{3})*"
    if decimal == ".":  # Indian digit groups: 12,34,567.50
        groups = rf"(?:{groups}|[1-9][0-9]?(?P<comma>,)(?:[0-9]{{2}},)+[0-9]{{3}})"
    mark = re.escape(decimal)
    whole = rf"(?:{groups}|[0-9]+)"
    return re.compile(rf"-?(?:{whole}(?:{mark}[0-9]*)?|{mark}[0-9]+)(?:[eE][+-]?[0-9]+)?", re.ASCII)
