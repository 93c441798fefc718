"""Check every theorem and print what was proved: `python -m theory`."""

import sys
from collections.abc import Iterable

from theory import Identity, theorems


def main(checks: Iterable[tuple[str, Iterable[Identity]]] | None = None) -> int:
    """0 if every identity holds. `checks`: (file, identities) pairs, by default all of theory/."""
    if checks is None:
        checks = ((f"theory/{path}", module.identities()) for path, module in theorems())
    files = claims = false = 0
    for path, identities in checks:
        files += 1
        print(path)
        for identity in identities:
            claims += 1
            if identity.holds():
                verdict = "difference = 0"
            else:
                false += 1
                verdict = f"DOES NOT HOLD, difference = {identity.difference}"
            print(f"  {identity.claim:<68} {verdict}", flush=True)
    if false:
        print(f"\n{false} of {claims} identities do not hold")
        return 1
    print(f"\n{claims} identities in {files} files: every difference is zero")
    return 0


if __name__ == "__main__":
    sys.exit(main())
