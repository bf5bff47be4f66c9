"""All keys of a set of pictures, for sets that are small."""

import numpy as np

from pipelines.data.pictures import Pictures


def keys_of(pictures: Pictures) -> list[str]:
    return pictures.keys.take(np.arange(len(pictures)))["key"].to_pylist()
