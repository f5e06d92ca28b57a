"""The tables of dual contouring against their rules and against counts of the published ones."""

from collections import Counter

import pytest
import torch

from kernels.surface.tables import EDGES, QUADS, ambiguous_faces, crossing, cube_tables, dual_parts

FACES = [[c for c in range(8) if (c >> axis & 1) == side] for axis in range(3) for side in range(2)]


@pytest.mark.parametrize("case", range(256))
def test_dual_vertices_are_loops_around_the_cube(case):
    """Each crossing edge belongs to one dual vertex, and continues across both of its faces."""
    parts = dual_parts(case)
    assert sorted(e for part in parts for e in part) == crossing(case)
    assert len(parts) <= 4 and all(3 <= len(part) <= 7 for part in parts)
    for part in parts:
        for e in part:
            for face in FACES:
                if set(EDGES[e]) <= set(face):
                    others = [o for o in part if o != e and set(EDGES[o]) <= set(face)]
                    assert others
                    if len([o for o in crossing(case) if set(EDGES[o]) <= set(face)]) == 4:
                        inside = [c for c in EDGES[e] if case >> c & 1]
                        assert any(set(inside) & set(EDGES[o]) for o in others)


def test_counts_are_the_published_ones():
    assert Counter(len(dual_parts(case)) for case in range(256)) == {
        0: 2,
        1: 162,
        2: 82,
        3: 8,
        4: 2,
    }
    tables = cube_tables(torch.device("cpu"))
    assert int((tables.direction >= 0).sum()) == 36
    assert torch.equal(tables.duals, (tables.component.amax(1) + 1).long())
    for case in range(256):
        assert (tables.direction[case] >= 0) == (
            len(ambiguous_faces(case)) == 1 and len(dual_parts(case)) == 1
        )
        for number, part in enumerate(dual_parts(case)):
            assert [e for e in tables.edges[4 * case + number].tolist() if e >= 0] == part
            assert (tables.component[case] == number).nonzero().flatten().tolist() == part


def test_an_ambiguous_case_and_its_inverse_cross_alike():
    tables = cube_tables(torch.device("cpu"))
    for case in (tables.direction >= 0).nonzero().flatten().tolist():
        assert crossing(case) == crossing(255 - case) and len(dual_parts(255 - case)) == 2


def test_the_cubes_of_a_quad_share_its_edge():
    for quad in QUADS:
        ends = set()
        for offset, edge in quad:
            points = [
                tuple(o + (c >> axis & 1) for axis, o in enumerate(offset)) for c in EDGES[edge]
            ]
            ends.add(tuple(points))
        assert len(ends) == 1  # in the same direction, too
        assert [offset for offset, _ in quad] == sorted(offset for offset, _ in quad)


def test_tables_are_made_once():
    device = torch.device("cpu")
    assert cube_tables(device) is cube_tables(device)
