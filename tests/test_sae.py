"""sae.py: the equations on paper, parity with sae-lens, the folder layout, nothing unpickled."""

import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sae as sae_module
from run.files import InputError, write_tensors
from sae import (CANONICAL_L0, SASA, SHAPES, JumpReLU, load_sae, load_saes, neuronpedia_url,
                 save_sae, save_sasa)

D, N = 6, 20  # width of the residual stream, features


def random_tensors(seed=0, d=D, n=N):
    draw = torch.Generator().manual_seed(seed)
    return {"W_enc": torch.randn(d, n, generator=draw), "b_enc": torch.randn(n, generator=draw),
            "threshold": torch.rand(n, generator=draw), "W_dec": torch.randn(n, d, generator=draw),
            "b_dec": torch.randn(d, generator=draw)}


def random_arrays(**changes):
    """The tensors as numpy arrays; a change of None leaves an array out."""
    arrays = {name: tensor.numpy() for name, tensor in random_tensors().items()} | changes
    return {name: array for name, array in arrays.items() if array is not None}


def write_npz(folder, arrays, layer=3, width=N, l0=7, save=np.savez):
    path = folder / f"layer_{layer}/width_{width}/average_l0_{l0}/params.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, **arrays)
    return path


# The equations

def test_worked_example():
    """h = (1·1+2·0+.5, 1·(−1)+2·1, 1·2+2·(−1)+.25) = (1.5, 1, .25) and θ = (1, 1, 0).

    1 is not above 1, so f = (1.5, 0, .25); x̂ = 1.5·(2, 0) + .25·(0, 4) + (10, 20).
    """
    sae = JumpReLU(W_enc=torch.tensor([[1.0, -1, 2], [0, 1, -1]]),
                   b_enc=torch.tensor([0.5, 0, 0.25]), threshold=torch.tensor([1.0, 1, 0]),
                   W_dec=torch.tensor([[2.0, 0], [5, 5], [0, 4]]), b_dec=torch.tensor([10.0, 20]))
    codes = sae.encode(torch.tensor([[1.0, 2]]))
    assert codes.tolist() == [[1.5, 0, 0.25]]
    assert sae.decode(codes).tolist() == [[13, 21]]
    assert sae.decoder_rows([2, 0]).tolist() == [[0, 4], [2, 0]]
    assert sae.encode(torch.tensor([[1.0, 2]]).bfloat16()).dtype == torch.float32


def test_sasa_worked_example():
    """Blocks of 2: p = (3, 0), (−3, 4), (1, 1) with norms 3, 5, √2; the first two stay, signed."""
    sae = SASA(W_enc=torch.tensor([[3.0, 0, 0, 4, 1, 1]]),
               b_enc=torch.tensor([0.0, 0, -3, 0, 0, 0]), W_dec=torch.eye(6)[:, :1] + 1,
               b_dec=torch.tensor([10.0]), block=2, active=2)
    codes = sae.encode(torch.tensor([[1.0]]))
    assert codes.tolist() == [[3, 0, -3, 4, 0, 0]]
    assert sae.activations(codes).tolist() == [[3, 5, 0]]
    assert sae.decode(codes).tolist() == [[17]]  # 3·2 + 0·1 − 3·1 + 4·1 + 10
    assert sae.n_units == 3 and sae.unit_rows([0, 2]).tolist() == [[[2], [1]], [[1], [1]]]


def test_sae_lens_agrees(tmp_path):
    """Encode, decode and the folder layout against sae-lens, and its list of canonical SAEs."""
    lens = pytest.importorskip("sae_lens")
    directory = pytest.importorskip("sae_lens.loading.pretrained_saes_directory")
    tensors = random_tensors(seed=1, d=32, n=200)
    path = save_sae(tmp_path, 2, 60.4, **tensors)
    assert path == tmp_path / "layer_2/width_200/average_l0_60/params.npz"
    ours = load_sae(tmp_path, 2, 200)
    config = lens.JumpReLUSAEConfig(d_in=32, d_sae=200, apply_b_dec_to_input=False)
    theirs = lens.JumpReLUSAE(config)
    with np.load(path) as arrays:
        theirs.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays})
    x = 3 * torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        codes = theirs.encode(x)
        x_hat = theirs.decode(codes)
    assert (codes > 0).float().mean() > 0.2
    assert (ours.encode(x) - codes).abs().max() <= 1e-5 * codes.abs().max()
    assert (ours.decode(codes) - x_hat).abs().max() <= 1e-5 * x_hat.abs().max()

    releases = directory.get_pretrained_saes_directory()
    for (repository, width), table in CANONICAL_L0.items():
        release = releases[repository.removeprefix("google/") + "-canonical"]
        names = [name for name in release.saes_map if f"/width_{width}/" in name]
        assert sorted(names) == sorted(f"layer_{n}/width_{width}/canonical" for n in table)
        for layer, l0 in table.items():
            name = f"layer_{layer}/width_{width}/canonical"
            assert release.saes_map[name] == f"layer_{layer}/width_{width}/average_l0_{l0}"
            url = f"https://www.neuronpedia.org/{release.neuronpedia_id[name]}/123"
            assert neuronpedia_url(repository, layer, width, 123) == url
            assert neuronpedia_url(repository, layer, width, 123, l0 + 1) is None


# The layout

@pytest.mark.parametrize("save, change", [
    (np.savez, np.asfortranarray), (np.savez_compressed, lambda a: a.astype(">f4")),
    (np.savez, lambda a: a.astype("f8"))])
def test_every_storage_reads_the_same(tmp_path, save, change):
    arrays = {name: change(array) for name, array in random_arrays().items()}
    write_npz(tmp_path, arrays, save=save)
    sae, tensors = load_sae(tmp_path, 3, N), random_tensors()
    assert torch.equal(sae.decoder_rows([7, 0, 7, 19]), tensors["W_dec"][[7, 0, 7, 19]])
    assert sae.decoder_rows([]).shape == (0, D) and sae.W_dec is sae.W_dec
    assert (sae.d_model, sae.n_features, sae.layer, sae.width, sae.l0) == (D, N, 3, str(N), 7)
    assert "residual stream after block 3" in str(sae)
    for name in SHAPES:
        assert torch.equal(getattr(sae, name), tensors[name]), name


# Which file, whose model

def test_a_folder_lists_what_it_holds(tmp_path):
    for layer, l0 in ((0, 7), (1, 7), (1, 30), (11, 7)):
        write_npz(tmp_path, random_arrays(), layer=layer, l0=l0)
    assert load_sae(tmp_path, 1, N, l0=30).l0 == 30
    for arguments, message in [((1, N), "several SAEs of layer 1.*0_7,.*0_30"),
                               ((2, N), "no SAE of layer 2.*layer_0/.*layer_11/"),
                               ((0, "16k"), f"no SAE.*width_{N}"), ((0, "../x"), "no SAE")]:
        with pytest.raises(InputError, match=message):
            load_sae(tmp_path, *arguments)


def test_a_folder_may_be_of_one_layer_or_one_sae(tmp_path):
    path = write_npz(tmp_path, random_arrays(), width="24k")     # a name that only the folder has
    for source in (tmp_path, *list(path.parents)[:3], path):
        assert list(load_saes(source, None, None, None, "cpu", SMALL)) == [3]
        assert load_sae(source, 3).n_features == N
        with pytest.raises(InputError, match="no SAE of layer 2"):
            load_sae(source, 2)


@pytest.mark.parametrize("name, message", [
    ("cfg.json", "SAELens' layout"), ("layer_3/cfg.json", "SAELens' layout"),
    ("ae.pt", "layer_N/width_W"), ("layer_3/width_20/average_l0_x/params.npz", "layer_N/width_W")])
def test_a_folder_without_saes_is_named(tmp_path, name, message):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=message):
        load_sae(tmp_path, 3)


def test_hub_names(tmp_path, monkeypatch):
    requests = []

    def locate(source, name):
        requests.append(name)
        return write_npz(tmp_path, random_arrays())
    monkeypatch.setattr(sae_module, "locate", locate)
    repository = "google/gemma-scope-2b-pt-res"
    for layer, width, l0, folder in [(20, "16k", None, "layer_20/width_16k/average_l0_71"),
                                     (12, "65k", 21, "layer_12/width_65k/average_l0_21")]:
        with pytest.raises(InputError, match=r"W_enc has shape \(6, 20\), not"):
            load_sae(repository, layer, width, l0)
        assert requests[-1] == f"{folder}/params.npz"
    for source, layer, width, message in [
            (repository, 26, "16k", "no canonical SAE of layer 26"),
            ("google/gemma-scope-9b-it-res", 10, "131k", "layers known: 9, 20, 31"),
            ("google/gemma-scope-9b-pt-res", 10, "131k", "none.: give --more l0=N"),
            ("someone/saes", 10, "16k", "give --more l0=N"),
            (repository, 20, "../x", "no canonical SAE")]:
        with pytest.raises(InputError, match=message):
            load_sae(source, layer, width)
    assert len(requests) == 2


SMALL = SimpleNamespace(hidden_size=D, num_hidden_layers=4)


def test_saes_of_another_model_are_refused(tmp_path):
    write_npz(tmp_path, random_arrays())
    for size, layers, message in ((7, 4, "hidden_size 7"), (D, 3, "layer 3, .* has 3 layers")):
        config = SimpleNamespace(hidden_size=size, num_hidden_layers=layers)
        with pytest.raises(InputError, match=message):
            load_saes(tmp_path, [3], str(N), None, "cpu", config)


def test_bad_arrays_show_when_they_are_read(tmp_path):
    write_npz(tmp_path, random_arrays(W_dec=np.zeros((N, D + 1), "f4")))
    sae = load_sae(tmp_path, 3, N)
    sae.encode(torch.zeros(2, D))
    for read in (lambda: sae.decoder_rows([0]), lambda: sae.W_dec):
        with pytest.raises(InputError, match="W_dec has shape"):
            read()
    write_npz(tmp_path, random_arrays(b_dec=np.full(D, np.nan, "f4")))
    with pytest.raises(InputError, match="b_dec has values that aren't finite"):
        load_sae(tmp_path, 3, N).encode(torch.zeros(2, D))
    write_npz(tmp_path, random_arrays(threshold=None))
    with pytest.raises(InputError, match=r"params.npz.*threshold can't be read"):
        load_sae(tmp_path, 3, N)


class Payload:
    """Unpickling it makes a folder."""
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_is_unpickled(tmp_path, monkeypatch):
    """Neither an array of objects in the .npz, nor a pickle that stands where the .npz should."""
    monkeypatch.chdir(tmp_path)
    payload = np.array([Payload()] * N, object)
    path = write_npz(tmp_path, random_arrays(b_enc=payload))
    with pytest.raises(InputError, match="b_enc can't be read"):
        load_sae(tmp_path, 3, N)
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InputError, match="params.npz"):
        load_sae(tmp_path, 3, N)
    assert not (tmp_path / "executed").exists()


def test_a_sasa_comes_back_or_is_named(tmp_path):
    tensors = {name: tensor for name, tensor in random_tensors().items() if name != "threshold"}
    text_path = save_sasa(tmp_path, 3, **tensors, block=5, active=2, nuclear=0.1)
    assert text_path == tmp_path / f"layer_3/width_{N}/average_l0_10/sasa.json"
    sae = load_sae(tmp_path, 3, N)
    assert "4 blocks of 5, 2 a token" in str(sae)
    assert all(torch.equal(getattr(sae, name), tensor) for name, tensor in tensors.items())
    path = text_path.with_name("sasa.safetensors")
    for changes, message in [({"W_dec": tensors["W_dec"][:-1]}, "W_dec has shape"),
                             ({"more": torch.zeros(1)}, "not a SASA's tensors")]:
        write_tensors(path, tensors | changes)
        with pytest.raises(InputError, match=message):
            load_sae(tmp_path, 3, N)
    write_tensors(path, tensors)
    for text in ("{", '{"block": "5", "active": 2}', '{"block": 3, "active": 1}'):
        text_path.write_text(text)
        with pytest.raises(InputError, match="sasa.json"):
            load_sae(tmp_path, 3, N)
    path.unlink()
    with pytest.raises(InputError, match="holds no file"):
        load_sae(tmp_path, 3, N)
