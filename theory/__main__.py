"""Check every theorem and print what was proved: `python -m theory`."""

import sys
from collections.abc import Iterable

from theory import Check, Counterexample, theorems


def main(checks: Iterable[tuple[str, Iterable[Check]]] | None = None) -> int:
    """0 if every claim holds. `checks`: (file, claims) pairs, by default all of theory/."""
    if checks is None:
        checks = ((f"theory/{path}", module.identities()) for path, module in theorems())
    files = 0
    held: dict[bool, list[bool]] = {False: [], True: []}  # by whether it is a counterexample
    for path, claims in checks:
        files += 1
        print(path)
        for check in claims:
            holds = check.holds()
            held[isinstance(check, Counterexample)].append(holds)
            if holds:
                verdict = check.verdict()
            else:
                verdict = f"DOES NOT HOLD, difference = {check.difference}"
            print(f"  {check.claim:<68} {verdict}", flush=True)
    identities, counterexamples = held[False], held[True]
    print()
    for name, each in (("identities", identities), ("counterexamples", counterexamples)):
        if not all(each):
            print(f"{each.count(False)} of {len(each)} {name} do not hold")
    if not all(identities + counterexamples):
        return 1
    shown = f"{len(identities)} identities in {files} files: every difference is zero"
    if counterexamples:
        shown += f"; {len(counterexamples)} counterexamples: every difference is not"
    print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
