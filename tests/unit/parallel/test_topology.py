from dataclasses import replace

from helpers.configs import make_config
from hypothesis import given
from hypothesis import strategies as st

from anyshard.parallel.topology import AXES, Mesh, draw, mesh_of, shorten

meshes = st.builds(Mesh, dp=st.integers(1, 4), tp=st.integers(1, 4), pp=st.integers(1, 3), sp=st.integers(1, 3))


@given(meshes)
def test_every_rank_has_its_own_coordinates(mesh):
    places = [tuple(sorted(mesh.coordinates(rank).items())) for rank in range(mesh.world_size)]
    assert len(set(places)) == mesh.world_size == mesh.dp * mesh.tp * mesh.pp * mesh.sp
    assert [mesh.rank(**mesh.coordinates(rank)) for rank in range(mesh.world_size)] == list(range(mesh.world_size))


@given(meshes)
def test_the_groups_of_an_axis_partition_the_ranks(mesh):
    for axis in AXES:
        groups = {tuple(mesh.group(axis, rank)) for rank in range(mesh.world_size)}
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
        assert all(len(group) == getattr(mesh, axis) for group in groups)


def test_tensor_parallel_ranks_are_neighbours():
    assert Mesh(dp=2, tp=2, pp=2).group("tp", 5) == [4, 5]
    assert Mesh(dp=2, tp=2, pp=2).group("dp", 5) == [1, 5]


@given(meshes, st.permutations(AXES))
def test_any_order_is_a_numbering(mesh, order):
    mesh = replace(mesh, order=tuple(order))
    assert [mesh.rank(**mesh.coordinates(rank)) for rank in range(mesh.world_size)] == list(range(mesh.world_size))
    used = next((axis for axis in order if getattr(mesh, axis) > 1), None)
    if used:
        assert mesh.group(used, 0) == list(range(getattr(mesh, used)))


def test_all_groups_of_an_axis():
    assert Mesh(dp=2, tp=2).groups("tp") == [[0, 1], [2, 3]]
    assert Mesh(dp=2, tp=2).groups("dp") == [[0, 2], [1, 3]]
    assert Mesh(dp=2, tp=2, order=("dp", "tp", "sp", "pp")).groups("tp") == [[0, 2], [1, 3]]


def test_the_mesh_is_drawn():
    assert draw(Mesh(dp=2, tp=2), ["a", "a", "b", "b"]) == ["dp 0: tp [0 1] on a", "dp 1: tp [2 3] on b"]
    assert draw(Mesh(dp=1, tp=2), ["a", "b"]) == ["tp [0 1] on a, b  <- tp crosses hosts"]
    assert draw(Mesh(dp=2), ["a", "b"]) == ["dp [0 1] on a, b"]
    assert draw(Mesh(dp=1), ["a"]) == ["dp [0] on a"]


def test_a_long_drawing_is_shortened():
    lines = [str(number) for number in range(40)]
    assert shorten(lines, 4) == ["0", "1", "... 36 more ...", "38", "39"]
    assert shorten(lines[:4], 4) == lines[:4]


def test_the_mesh_of_a_configuration():
    config = make_config({"parallel.dp": 3, "parallel.tp": 2, "parallel.order": ["dp", "tp", "sp", "pp"]})
    assert mesh_of(config) == Mesh(dp=3, tp=2, order=("dp", "tp", "sp", "pp"))
