"""Random inputs of every op, drawn from one seed: sizes with 0 and 1 among them, dtypes, strides,
and the op's reference.
"""

from tests.helpers.random_inputs.features import (
    attention,
    convolution,
    coordinates,
    group_norms,
    norms,
    scales,
    segments,
)
from tests.helpers.random_inputs.pictures import (
    attributes,
    gaussians,
    mesh_pictures,
    projections,
    radiance,
    rasters,
    silhouettes,
    similarity,
    surfaces,
)

DRAWS = {
    draw.__name__: draw
    for draw in (
        norms,
        attention,
        segments,
        convolution,
        group_norms,
        scales,
        similarity,
        surfaces,
        projections,
        rasters,
        attributes,
        silhouettes,
        mesh_pictures,
        gaussians,
        radiance,
        coordinates,
    )
}
