"""A certificate of the gamma theorem, on the code that trains.

A case is two runs: R, with gamma = 1, and A, with another gamma and whatever lyco_lab/gamma.py
makes of R's settings then. Both train as any run does, on the same batches, and what the theorem
says of them is compared with what they did.

case.py       names and settings -> R and A, and what the theorem says of the two
trace.py      a run -> its loss and the W' - W of every layer, step by step
verdict.py    two traces -> equal in every bit, equal up to rounding, or different, and where
cause.py      a claim that does not hold -> the power of s with which it would
power.py      an equality -> whether a wrong claim would have been seen
work.py       cases -> verdicts, by several processes
table.py      verdicts -> a line, a table, a CSV
"""
