"""What a stranger can hand us, at random: each fuzz_*.py is one reader. Run for long with `make fuzz`.

A target is a module with `check(data)`, which raises where the reader did anything but answer or refuse in an error of
our tree, and `CASES`, a Hypothesis strategy of bytes. What was found lies in corpus/<target>/ and is run first.
"""
