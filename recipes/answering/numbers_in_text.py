"""The number that an answer in words comes to."""

import re
from decimal import Decimal


# 1,234,567.89 and .5, after an optional sign and currency; a comma that does not part thousands ends the number.
NUMBER = r"(?P<sign>[-+\u2212]?)[$€£]?(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
MARKED = re.compile(r"(?:####|the (?:final )?answer is:?)[\s*$\\({]*(?:boxed\{)?" + NUMBER, re.IGNORECASE)
ANY = re.compile(r"(?<![\w.])" + NUMBER)  # the 5 of 10-5 is no -5


def marked_number(text: str) -> Decimal | None:
    """
    Return the number behind the first `####`, or where there is none behind the first "The answer is".

    MetaMathQA ends with both and GSM8K with the former. The first counts, because a model that does not stop goes on
    with questions of its own.
    """
    matches = list(MARKED.finditer(text))
    hashes = [match for match in matches if match.group().startswith("####")]
    return _value((hashes or matches)[0]) if matches else None


def final_number(text: str) -> Decimal | None:
    """Return the marked number, or the last number of the text where none is marked, or `None`."""
    marked = marked_number(text)
    if marked is not None:
        return marked
    matches = list(ANY.finditer(text))
    return _value(matches[-1]) if matches else None


def _value(match: re.Match[str]) -> Decimal:
    number = Decimal(match["digits"].replace(",", ""))
    return -number if match["sign"] in ("-", "\u2212") else number
