"""The face parser: its one file, and its upsampling. Common tests are in test_networks.py."""

import jax.numpy as jnp
import network_cases
import numpy as np
import pytest
from network_cases import BISENET

from samjax.errors import UserError
from samjax.nets import bisenet


def test_second_file_is_refused():
    (file,) = BISENET.files(network_cases.state_dict(BISENET))
    start = "cp.resnet."
    resnet = {name.removeprefix(start): array for name, array in file.items() if name.startswith(start)}
    with pytest.raises(UserError, match=r"79999_iter\.pth alone"):
        BISENET.network.find([file, resnet])


def test_doubling_matches_torch():
    torch = pytest.importorskip("torch")
    for size in (1, 2, 3, 8, 33):
        x = network_cases.random_images(1, (size + 1) // 2, 3, 2, seed=1)
        theirs = torch.nn.functional.interpolate(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), (size, 5))
        ours = np.asarray(bisenet.double(jnp.asarray(x), (size, 5))).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(ours, theirs.numpy())
