"""
Work out what a start sends on many processes, how long that takes, and whether sharing out the factorisations pays.

    python recipes/benchmarks/at_scale.py --model 7b --processes 8 64 512
    python recipes/benchmarks/at_scale.py --model 70b --gigabytes_a_second 1.25       # on a network of 10 Gbit/s

Nothing runs on many processes here, and a second look (`min_energy_kept`) is left out. Number and bytes of the
collectives follow from the shapes of the layers; a test compares them with those of 2 and 4 real processes. Seconds
follow from a latency and a bandwidth that you give: a ring all-reduce of n bytes takes `2 (N - 1) latency +
2 (N - 1) / N n / bandwidth`, a broadcast `log2(N) latency + n / bandwidth`. Factorising takes what one core of a CPU
took for a layer of 4096 x 4096 in bf16, in proportion to its size: 22 ms for a turn and 36 ms for the last recovery
(recipes/benchmarks/README.md). A GPU's figures are not known yet: `--turn` and `--recover` take others.
"""

import argparse
import math
from dataclasses import dataclass


HELD_OUT, BUCKET = 16, 2**28
Shape = tuple[int, int]  # (out, in)
BLOCKS: dict[str, tuple[int, list[Shape]]] = {
    "7b": (32, [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]),
    "70b": (80, [(8192, 8192)] * 2 + [(1024, 8192)] * 2 + [(28672, 8192)] * 2 + [(8192, 28672)]),
}


@dataclass(frozen=True)
class Start:
    """
    The plan of one start.

    Args:
        shapes: of the adapted layers, all of them sketched.
        r: rank.
        samples: wanted of the probe.
        processes, micro_batch: rows that a round reads are their product.
        turn, recover: seconds for a layer of 4096 x 4096.
    """

    shapes: list[Shape]
    r: int
    samples: int
    processes: int
    micro_batch: int = 1
    turn: float = 0.022
    recover: float = 0.036

    @property
    def k(self) -> int:
        return 8 * self.r

    @property
    def rounds(self) -> int:
        return math.ceil(self.samples / (self.processes * self.micro_batch))

    @property
    def turns(self) -> int:
        """How often test matrices are made anew: at turning points between rounds, and after a look at a large one."""
        points = [int(self.samples * share) for share in (1 / 16, 1 / 4, 1 / 2)]
        points, found, seen = [point for point in points if point > 0], 0, 0
        for number in range(self.rounds):
            passed = [point for point in points if point <= seen]
            points = points[len(passed) :]
            found += bool(passed) + (number == 0 and self.processes * self.micro_batch > self.samples / 4)
            seen += self.processes * self.micro_batch
        return found

    def all_reduces(self) -> list[int]:
        """Return the bytes of each large all-reduce."""
        sides = [side for shape in self.shapes for side in shape]
        of_turn = _buckets([4 * self.k * side for side in sides])
        return of_turn * self.turns + _buckets([4 * (self.k + HELD_OUT) * side for side in sides])

    def broadcasts(self) -> list[int]:
        """Return the bytes of each broadcast: the test matrices of every turn, and the factors."""
        found = []
        for columns, more, times in ((self.k, 4 * self.k, self.turns), (self.r, 0, 1)):
            for owner in range(self.processes):
                owned = self.shapes[owner :: self.processes]
                parts = [[4 * columns * out, 4 * columns * in_] + [more] * bool(more) for out, in_ in owned]
                found += times * _buckets([part for some in parts for part in some])
        return found

    def seconds_of_collectives(self, latency: float, bandwidth: float) -> float:
        N = self.processes
        reduce = sum(2 * (N - 1) * latency + 2 * (N - 1) / N * n / bandwidth for n in self.all_reduces())
        small = (2 * self.rounds + 8) * 2 * (N - 1) * latency
        return reduce + small + sum(math.log2(N) * latency + n / bandwidth for n in self.broadcasts())

    def seconds_of_factorising(self, shared: bool) -> float:
        size = lambda shape: sum(shape) / (4096 + 4096)
        of_layer = lambda shape: size(shape) * (self.turn * self.turns + self.recover)
        size_of_share = self.processes if shared else 1
        return max(sum(map(of_layer, self.shapes[owner::size_of_share])) for owner in range(size_of_share))


def _buckets(sizes: list[int]) -> list[int]:
    """Add up tensors to buckets of at most 256 MiB, as the package sends them."""
    found: list[int] = []
    for size in sizes:
        if not found or found[-1] + size > BUCKET:
            found.append(0)
        found[-1] += size
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=BLOCKS, default="7b")
    parser.add_argument("--processes", nargs="+", type=int, default=[8, 64, 512])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--micro_batch", type=int, default=1)
    parser.add_argument("--latency", type=float, default=2e-5, help="seconds from one process to the next")
    parser.add_argument("--gigabytes_a_second", type=float, default=25.0, help="of each process's link")
    parser.add_argument("--turn", type=float, default=Start.turn, help="seconds, for a layer of 4096 x 4096")
    parser.add_argument("--recover", type=float, default=Start.recover, help="the same")
    args = parser.parse_args()
    count, block = BLOCKS[args.model]
    rows = []
    for processes in args.processes:
        start = Start(block * count, args.rank, args.samples, processes, args.micro_batch, args.turn, args.recover)
        sent = start.seconds_of_collectives(args.latency, 1e9 * args.gigabytes_a_second)
        looked = processes * args.micro_batch > args.samples / 4
        rows.append(
            {
                "processes": f"{processes}",
                "rounds, with the look": f"{start.rounds + looked}",
                "samples read": f"{start.rounds * processes * args.micro_batch}",
                "turns": f"{start.turns}",
                "GB all-reduced": f"{sum(start.all_reduces()) / 1e9:.2f}",
                "broadcasts": f"{len(start.broadcasts())}",
                "seconds of collectives": f"{sent:.2f}",
                "of factorising, shared out": f"{start.seconds_of_factorising(shared=True):.1f}",
                "by every process alone": f"{start.seconds_of_factorising(shared=False):.1f}",
            }
        )
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(row.values()) + " |")


if __name__ == "__main__":
    main()
