"""The ADE20K segmenter: its two files, and its pooling. Common tests are in test_networks.py."""

import jax.numpy as jnp
import network_cases
import numpy as np
import pytest
from network_cases import ADE20K

from samjax.errors import UserError
from samjax.nets import ade20k


def test_both_files_are_needed_and_no_other():
    encoder, decoder = ADE20K.files(network_cases.state_dict(ADE20K))
    for files in (
        [encoder], [decoder], [encoder, encoder], [encoder, {}], [decoder, None], [encoder, decoder, {}],
        [encoder, decoder, decoder],
    ):  # fmt: skip
        with pytest.raises(UserError, match=r"encoder_epoch_20\.pth and decoder_epoch_20\.pth") as error:
            ADE20K.network.find(files)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [(24, 32), (10, 13), (7, 4), (1, 2)])
def test_adaptive_mean_matches_torch(size):
    """With overlapping parts, and with fewer entries than parts."""
    torch = pytest.importorskip("torch")
    x = network_cases.random_images(2, *size, 3, seed=1)
    for count in (1, 2, 3, 6):
        theirs = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), count)
        ours = np.asarray(ade20k.adaptive_mean(jnp.asarray(x), count)).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)  # float32 rounding
