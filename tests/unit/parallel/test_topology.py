from hypothesis import given
from hypothesis import strategies as st

from anyshard.parallel.topology import AXES, Mesh

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
