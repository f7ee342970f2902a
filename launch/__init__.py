"""launch: imported as `anyshard.launch`, never by its bare name."""

if __name__ != "anyshard.launch":
    raise ImportError(
        f"'{__name__}' is part of anyshard: write 'import anyshard.launch' (a bare 'launch' collides with other packages)"
    )
