"""offload: imported as `anyshard.offload`, never by its bare name."""

if __name__ != "anyshard.offload":
    raise ImportError(
        f"'{__name__}' is part of anyshard: write 'import anyshard.offload' (a bare 'offload' collides with other packages)"
    )
