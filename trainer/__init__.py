"""trainer: imported as `anyshard.trainer`, never by its bare name."""

if __name__ != "anyshard.trainer":
    raise ImportError(
        f"'{__name__}' is part of anyshard: write 'import anyshard.trainer' (a bare 'trainer' collides with other packages)"
    )
