"""Product quantisation: a byte for every few neighbouring values of a vector, by a codebook learned from such vectors.

    codes [*vectors, parts]        uint8
    codebook [parts, 256, DIMS]    float32: what each byte stands for; parts * DIMS = dim

Source: Jegou et al. 2011, as faiss has it; k-means on one thread, so that the same vectors give the same codebook.
"""

import numpy as np
from jaxtyping import Float, Float16, Float32, UInt8
from numpy import ndarray

DIMS = 4  # values of a byte: an eighth of float16's bytes
LEVELS = 256
TRAINING = 16_384  # vectors that a codebook is learned from, 64 for each level


def train(values: Float[ndarray, "vectors dim"]) -> Float32[ndarray, "parts levels dims"]:
    """The codebook of the vectors; fewer than a level each are repeated, and none give zeros.

    Raises:
        ValueError: dim is no multiple of DIMS.
    """
    import faiss

    dim = values.shape[1]
    if dim % DIMS:
        raise ValueError(f"vectors of {dim} values cannot be cut into parts of {DIMS}")
    if not len(values):
        return np.zeros((dim // DIMS, LEVELS, DIMS), np.float32)
    quantiser = faiss.ProductQuantizer(dim, dim // DIMS, 8)
    quantiser.cp.min_points_per_centroid = 1  # no warning
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        enough = np.resize(values, (max(len(values), LEVELS), dim))
        quantiser.train(np.ascontiguousarray(enough, np.float32))
    finally:
        faiss.omp_set_num_threads(threads)
    return faiss.vector_to_array(quantiser.centroids).reshape(-1, LEVELS, DIMS)


def encode(
    values: Float[ndarray, "*vectors dim"], codebook: Float32[ndarray, "parts levels dims"]
) -> UInt8[ndarray, "*vectors parts"]:
    """The nearest level of each part."""
    import faiss

    flat = np.ascontiguousarray(values.reshape(-1, values.shape[-1]), np.float32)
    quantiser = faiss.ProductQuantizer(flat.shape[1], len(codebook), 8)
    faiss.copy_array_to_vector(codebook.ravel(), quantiser.centroids)
    return quantiser.compute_codes(flat).reshape(*values.shape[:-1], len(codebook))


def decode(
    codes: UInt8[ndarray, "*vectors parts"], codebook: Float32[ndarray, "parts levels dims"]
) -> Float16[ndarray, "*vectors dim"]:
    """The vectors that the codes stand for, rounded to float16."""
    found = codebook.astype(np.float16)[np.arange(len(codebook)), codes]
    return found.reshape(*codes.shape[:-1], codebook[:, 0].size)  # -1 is not known of no vectors
