"""configs: imported as `anyshard.configs`, never by its bare name."""

if __name__ != "anyshard.configs":
    raise ImportError(
        f"'{__name__}' is part of anyshard: write 'import anyshard.configs' (a bare 'configs' collides with other packages)"
    )
