"""parallel: imported as `anyshard.parallel`, never by its bare name."""

if __name__ != "anyshard.parallel":
    raise ImportError(
        f"'{__name__}' is part of anyshard: write 'import anyshard.parallel' (a bare 'parallel' collides with other packages)"
    )
