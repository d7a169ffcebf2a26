"""What sharing would save in a training on the user's own data, computed without running a model: ``prefix-grouper plan``.

:mod:`.data` reads prompts and the lengths of responses, :mod:`.schedule` deals the rows out to micro-batches as TRL and
verl do, :mod:`.estimate` turns what each of them forwards into FLOPs and memory, :mod:`.advice` looks for better sizes,
:mod:`.report` prints, and :mod:`.command` is the command. ``benchmarks/plan_check.py`` compares with measurements.
"""
