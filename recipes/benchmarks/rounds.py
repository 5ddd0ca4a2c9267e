"""
Rounds of a timing: repeated while they disagree, and told with their spread.

A neighbour on the same machine can double a figure. In a round everything that is compared takes a turn, and a ratio
is that of one round. Rounds disagree where the middle half of a ratio's rounds is wider than 10% of the median. Of
fewer than four rounds that is all of them.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar


TOLERANCE = 0.1
Round = TypeVar("Round")
Ratios = Callable[[Sequence[Round]], Mapping[str, Sequence[float]]]  # by name, one for each round


def spread(ratios: Sequence[float]) -> dict[str, float | int | bool | list[float]]:
    """Return the median, the range, the middle half, the number of rounds, and whether they disagree."""
    ranked, median = sorted(ratios), statistics.median(ratios)
    quarter = len(ranked) // 4
    low, high = ranked[quarter], ranked[-1 - quarter]
    return {
        "median": median,
        "least": ranked[0],
        "most": ranked[-1],
        "middle_half": [low, high],
        "rounds": len(ranked),
        "disagree": high - low > TOLERANCE * median,
    }


def run_rounds(one: Callable[[int], Round], ratios_of: Ratios, rounds: int, most: int) -> list[Round]:
    """
    Run `rounds` rounds, and more of them, up to `most`, while a ratio's rounds disagree. Says so.

    Args:
        one: runs the round of a number, from 0.
        ratios_of: gives the ratios of all rounds so far.
        rounds, most: the least and the largest number of rounds.
    """
    found = [one(number) for number in range(rounds)]
    while apart := _disagreeing(ratios_of(found)):
        if len(found) >= most:
            print(f"After {len(found)} rounds, the most allowed, there is disagreement: {apart}.", flush=True)
            break
        print(f"After {len(found)} rounds there is disagreement: {apart}. One more round.", flush=True)
        found.append(one(len(found)))
    return found


def _disagreeing(ratios: Mapping[str, Sequence[float]]) -> str:
    apart = {name: row for name, values in ratios.items() if (row := spread(values))["disagree"]}
    return "; ".join(f"{name} {tell(row)}" for name, row in apart.items())


def tell(row: Mapping[str, float | int | bool | list[float]]) -> str:
    """Put a [`spread`] in words."""
    low, high = row["middle_half"]
    words = f"{row['median']:.3f} ({row['rounds']} rounds, {row['least']:.3f} to {row['most']:.3f}"
    words += f", middle half {low:.3f} to {high:.3f}" if row["rounds"] >= 4 else ""
    return words + (", they disagree)" if row["disagree"] else ")")


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Add `--rounds` and `--most_rounds`."""
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--most_rounds", type=int, help="where rounds disagree; default: twice --rounds")


def most_rounds(args: argparse.Namespace) -> int:
    return 2 * args.rounds if args.most_rounds is None else args.most_rounds
