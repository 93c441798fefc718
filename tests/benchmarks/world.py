"""How many pictures of the world one core draws in a second.

python tests/benchmarks/world.py
"""

import random
import statistics
import time

from lyco_lab.miniature.vocabulary import BASE, sample
from lyco_lab.miniature.world import render


def main(count: int = 400, rounds: int = 5) -> None:
    rates = []
    for r in range(rounds):
        began = time.process_time()
        for i in range(count):
            rng = random.Random(f"{r}:{i}")
            render(sample(rng), rng)
        rates.append(count / (time.process_time() - began))
    print(f"{statistics.median(rates):.0f} pictures/s (median of {rounds} rounds of {count})")
    for kind in BASE["kind"]:
        began = time.process_time()
        for i in range(count // 4):
            rng = random.Random(i)
            render(sample(rng, kind), rng)
        print(f"  {kind:10} {count / 4 / (time.process_time() - began):.0f}/s")


if __name__ == "__main__":
    main()
