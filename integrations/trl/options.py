"""Names of the launcher's options, for which nothing else need be imported: the fields of ``PrefixGrouperArguments``."""

SWITCHES = frozenset({"use_prefix_grouper", "prefix_grouper_rebatch", "prefix_grouper_self_check"})
OPTIONS = SWITCHES | {"prefix_grouper_backend", "prefix_grouper_regroup", "prefix_grouper_on_unsupported"}
