"""What a CPU needs so that a whole verl training runs on a laptop: a platform, a rollout, a tiny model, a launcher.

Only the demo and the tests use it. Importing the package imports nothing; verl loads `platform` into each of
its processes and `rollout` into those that sample.
"""
