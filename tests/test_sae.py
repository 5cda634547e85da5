"""sae.py: the equation on paper, parity with sae-lens, the layout, and that a bad file gives InputError and nothing else."""

import random
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

import sae as sae_module
from run.files import InputError
from sae import ARRAYS, CANONICAL_L0, SASA, JumpReLU, load_sae, neuronpedia_url, read_params, save_sae, save_sasa

D, N = 6, 20  # residual width, features


def arrays(seed=0, d=D, n=N):
    g = torch.Generator().manual_seed(seed)
    return {"W_enc": torch.randn(d, n, generator=g), "b_enc": torch.randn(n, generator=g), "threshold": torch.rand(n, generator=g),
            "W_dec": torch.randn(n, d, generator=g), "b_dec": torch.randn(d, generator=g)}


def numpy_arrays(**kw):
    return {name: tensor.numpy() for name, tensor in arrays(**kw).items()}


def write(folder, given, layer=3, width=str(N), l0=7, save=np.savez):
    path = folder / f"layer_{layer}" / f"width_{width}" / f"average_l0_{l0}" / "params.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, **given)
    return path


# ---------------------------------------------------------------------------------------------------------------
# The equation

def test_worked_example():
    """h = (1·1+2·0+.5, 1·(-1)+2·1, 1·2+2·(-1)+.25) = (1.5, 1, .25), θ = (1, 1, 0): 1 is not above 1, so f = (1.5, 0, .25)."""
    sae = JumpReLU(torch.tensor([[1., -1, 2], [0, 1, -1]]), torch.tensor([.5, 0, .25]), torch.tensor([1., 1, 0]),
                   torch.tensor([[2., 0], [5, 5], [0, 4]]), torch.tensor([10., 20]))
    codes = sae.encode(torch.tensor([[1., 2]]))
    assert codes.tolist() == [[1.5, 0, .25]]
    assert sae.decode(codes).tolist() == [[13., 21.]]  # 1.5·(2, 0) + .25·(0, 4) + (10, 20)
    assert sae.decoder_rows([2, 0]).tolist() == [[0, 4], [2, 0]]


def test_parity_with_sae_lens():
    lens = pytest.importorskip("sae_lens")
    given = arrays(seed=1, d=32, n=200)
    theirs = lens.JumpReLUSAE(lens.JumpReLUSAEConfig(d_in=32, d_sae=200, apply_b_dec_to_input=False))
    theirs.load_state_dict(given)
    x = 3 * torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(2))
    ours = JumpReLU(**given)
    codes = ours.encode(x)
    with torch.no_grad():
        wanted = theirs.encode(x)
        assert (wanted > 0).float().mean() > 0.2
        assert (codes - wanted).abs().max() <= 1e-5 * wanted.abs().max()
        x_hat = theirs.decode(wanted)
        assert (ours.decode(codes) - x_hat).abs().max() <= 1e-5 * x_hat.abs().max()


def test_low_precision_residuals_are_encoded_in_float32():
    sae, x = JumpReLU(**arrays()), torch.randn(5, D).bfloat16()
    assert sae.encode(x).dtype == torch.float32
    assert torch.equal(sae.encode(x), sae.encode(x.float()))


def test_gradient_flows_through_firing_features_only():
    sae = JumpReLU(**arrays())
    x = torch.randn(3, D, requires_grad=True)
    codes = sae.encode(x)
    codes.sum().backward()
    assert torch.allclose(x.grad, (codes > 0).float() @ sae.W_enc.T, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# The layout

def test_round_trip_and_layout(tmp_path):
    given = arrays()
    path = save_sae(tmp_path, 3, 7.4, **given)
    assert path == tmp_path / "layer_3" / f"width_{N}" / "average_l0_7" / "params.npz"
    with np.load(path, allow_pickle=False) as file:  # a peer reads it
        assert sorted(file) == sorted(ARRAYS) and all(file[name].dtype == np.float32 for name in file)
    sae = load_sae(tmp_path, 3, N)
    for name in ARRAYS:
        assert torch.equal(getattr(sae, name), given[name]), name
    assert (sae.d_model, sae.n_features, sae.layer, sae.width, sae.l0) == (D, N, 3, str(N), 7)
    assert "residual stream after block 3" in str(sae) and "BOS" in str(sae)


def test_published_width_names(tmp_path):
    given = arrays(d=2, n=16384)
    assert "width_16k" in str(save_sae(tmp_path, 0, 5, **given))
    assert load_sae(tmp_path, 0).n_features == 16384


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("change", [lambda a: a, np.asfortranarray, lambda a: a.astype(">f4"), lambda a: a.astype("f8")])
def test_every_storage_reads_the_same(tmp_path, save, change):
    given = arrays()
    write(tmp_path, {name: change(tensor.numpy()) for name, tensor in given.items()}, save=save)
    sae = load_sae(tmp_path, 3, N)
    assert torch.equal(sae.decoder_rows([7, 0, 7, 19]), given["W_dec"][[7, 0, 7, 19]])
    assert sae.decoder_rows([]).shape == (0, D)
    for name in ARRAYS:
        assert torch.equal(getattr(sae, name), given[name]), name
    with pytest.raises(IndexError):
        sae.decoder_rows([N])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_only_the_asked_rows_of_the_decoder_are_read(tmp_path, save):
    given = numpy_arrays(d=64, n=16384)  # 4 MiB a matrix
    write(tmp_path, given, width="16k", save=save)
    sae = load_sae(tmp_path, 3)
    tracemalloc.start()
    rows = sae.decoder_rows(range(0, 16384, 1024))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert torch.equal(rows, torch.from_numpy(given["W_dec"][::1024]))
    assert isinstance(sae._W_dec, sae_module.Array)
    assert peak < given["W_dec"].nbytes / (8 if save is np.savez else 1)  # zipfile streams a skip by the MiB
    x = torch.randn(2, 64)
    assert sae.decode(sae.encode(x)).shape == x.shape and torch.is_tensor(sae._W_dec)


# ---------------------------------------------------------------------------------------------------------------
# Which file, whose model

def test_folder_says_what_it_holds(tmp_path):
    for layer, l0 in ((0, 7), (1, 7), (1, 30), (11, 7)):
        write(tmp_path, numpy_arrays(), layer=layer, l0=l0)
    assert load_sae(tmp_path, 1, N, l0=30).l0 == 30
    for call, wanted in (((1, N), "--l0 is one of 7, 30"), ((1, N, 8), "7, 30"), ((2, N), "0, 1, 11"), ((0, "16k"), f"one of {N}"),
                         ((0, "17k"), "known are 4k"), ((0, "../x"), "known are"), ((0, -5), "known are")):
        with pytest.raises(InputError, match=wanted):
            load_sae(tmp_path, *call)
    with pytest.raises(InputError, match="layer_N/width_W"):
        load_sae(tmp_path / "layer_0", 0, N)


def test_hub_names(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sae_module, "locate", lambda source, name: asked.append((source, name)) or write(tmp_path, numpy_arrays()))
    for layer, width, l0, file in ((20, "16k", None, "layer_20/width_16k/average_l0_71"), (5, "16k", 18, "layer_5/width_16k/average_l0_18"),
                                   (12, "65k", 21, "layer_12/width_65k/average_l0_21")):
        with pytest.raises(InputError, match=f"means \\d+ features, the file holds {N}"):
            load_sae("google/gemma-scope-2b-pt-res", layer, width, l0)
        assert asked[-1] == ("google/gemma-scope-2b-pt-res", f"{file}/params.npz")
    for source, layer, width, wanted in (("google/gemma-scope-2b-pt-res", 26, "16k", "layers are 0 to 25"),
                                         ("google/gemma-scope-9b-it-res", 10, "131k", "layers are 9, 20, 31"),
                                         ("google/gemma-scope-9b-pt-res", 10, "131k", "only for 16k: say --l0"),
                                         ("someone/saes", 10, "16k", "say --l0"), ("nosuchfolder", 10, "16k", "no such folder"),
                                         ("google/gemma-scope-2b-pt-mlp", 10, "16k", "not SAEs of the residual stream")):
        with pytest.raises(InputError, match=wanted):
            load_sae(source, layer, width)
    assert len(asked) == 3


def test_canonical_tables():
    """Against sae-lens's list where it is installed; the layers that the paper uses, always."""
    assert [CANONICAL_L0["google/gemma-scope-2b-pt-res", "16k"][n] for n in (5, 10, 15, 20)] == [68, 77, 78, 71]
    assert [CANONICAL_L0["google/gemma-scope-9b-pt-res", "16k"][n] for n in (10, 15, 20, 25, 30)] == [113, 131, 68, 114, 120]
    lens = pytest.importorskip("sae_lens")
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
    directory = get_pretrained_saes_directory()
    for (repo, width), table in CANONICAL_L0.items():
        release = directory[repo.removeprefix("google/") + "-canonical"]
        theirs = {name: path for name, path in release.saes_map.items() if f"/width_{width}/" in name}
        assert theirs == {f"layer_{n}/width_{width}/canonical": f"layer_{n}/width_{width}/average_l0_{l0}" for n, l0 in table.items()}
        for n in table:
            url = f"https://www.neuronpedia.org/{release.neuronpedia_id[f'layer_{n}/width_{width}/canonical']}/123"
            assert neuronpedia_url(repo, n, width, 123) == url
    assert lens


def test_neuronpedia_addresses():
    url = "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k/123"
    assert neuronpedia_url("google/gemma-scope-2b-pt-res", 20, "16k", 123) == url
    assert neuronpedia_url("google/gemma-scope-2b-pt-res", 20, "16k", 123, l0=71) == url
    assert (neuronpedia_url("google/gemma-scope-9b-it-res", 9, "131k", 5)
            == "https://www.neuronpedia.org/gemma-2-9b-it/9-gemmascope-res-131k/5")
    for args in (("google/gemma-scope-2b-pt-res", 20, "16k", 1, 70), ("toy/sae", 20, "16k", 1),
                 ("google/gemma-scope-2b-pt-res", 26, "16k", 1)):
        assert neuronpedia_url(*args) is None


def test_sae_of_another_model(tmp_path):
    write(tmp_path, numpy_arrays())
    sae = load_sae(tmp_path, 3, N)
    sae.check(D, 4)
    with pytest.raises(InputError, match="hidden_size 7"):
        sae.check(7, 4)
    with pytest.raises(InputError, match="layers are 0 to 2"):
        sae.check(D, 3)


# ---------------------------------------------------------------------------------------------------------------
# Bad files

def changed(**changes):
    return {name: array for name, array in (numpy_arrays() | changes).items() if array is not None}


@pytest.mark.parametrize("given, wanted", [
    (changed(threshold=None), "lacks threshold"),
    (changed(extra=np.zeros(3, "f4")), "holds 'extra.npy'"),
    (changed(b_enc=np.zeros(N, object)), "unpickled"),
    (changed(b_enc=np.zeros(N, "i4")), "float"),
    (changed(b_enc=np.zeros(N, "c8")), "float"),
    (changed(b_enc=np.zeros(N, [("x", "f4")])), "not a plain numpy array"),
    (changed(b_enc=np.zeros((N, 1), "f4")), "agree"),
    (changed(b_enc=np.zeros(D, "f4")), "agree"),
    (changed(W_enc=np.zeros(N, "f4")), "agree"),
    (changed(W_enc=np.zeros((), "f4")), "agree"),
    (changed(W_dec=np.zeros((D, N), "f4")), "agree"),
    (changed(b_dec=np.full(D, np.nan, "f4")), "finite"),
    (changed(W_enc=np.full((D, N), 1e300)), "finite"),
    (changed(threshold=np.full(N, -1, "f4")), "below 0"),
    ({name: np.zeros([0] * len(letters), "f4") for name, letters in ARRAYS.items()}, "agree"),
])
def test_bad_arrays(tmp_path, given, wanted):
    write(tmp_path, given)
    with pytest.raises(InputError, match=wanted) as error:
        load_sae(tmp_path, 3, N)
    assert "params.npz" in str(error.value) and "\n" not in str(error.value)


def test_bad_values_in_the_decoder_show_when_it_is_read(tmp_path):
    write(tmp_path, changed(W_dec=np.full((N, D), np.inf, "f4")))
    sae = load_sae(tmp_path, 3, N)
    for read in (lambda: sae.decoder_rows([0]), lambda: sae.W_dec):
        with pytest.raises(InputError, match="W_dec has values that aren't finite"):
            read()


def npy(header, data=b"", version=b"\1\0"):
    return b"\x93NUMPY" + version + len(header).to_bytes(2 if version == b"\1\0" else 4, "little") + header.encode() + data


def write_claims(path, claims, compression=0):
    """The usual five arrays, but with headers that claim other shapes."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, array in numpy_arrays().items():
            shape = claims.get(name, array.shape)
            archive.writestr(name + ".npy", npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n", array.tobytes()))


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_headers_that_claim_more_or_less_than_there_is(tmp_path, compression):
    path, D2 = write(tmp_path, numpy_arrays()), 40_000_000
    write_claims(path, {}, compression)
    load_sae(tmp_path, 3, N)
    tracemalloc.start()
    for claims in ({"W_enc": (D2, N), "W_dec": (N, D2), "b_dec": (D2,)}, {"W_enc": (D - 1, N), "W_dec": (N, D - 1), "b_dec": (D - 1,)}):
        write_claims(path, claims, compression)
        with pytest.raises(InputError, match="isn't what the file holds"):
            load_sae(tmp_path, 3, N)
    for shape in (f"({'9' * 3000}, 2)", f"({'9' * 9000}, 2)", "(-1, 6)"):
        write_claims(path, {"W_dec": shape}, compression)
        with pytest.raises(InputError):
            load_sae(tmp_path, 3, N)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("name, read", [("b_dec", lambda sae: None), ("W_dec", lambda sae: sae.decoder_rows([N - 1])),
                                        ("W_dec", lambda sae: sae.W_dec)])
def test_directory_that_claims_more_than_the_stream_holds(tmp_path, name, read):
    """Header and directory agree, the deflated stream ends 4 bytes early: no uninitialised memory."""
    path, size = write(tmp_path, numpy_arrays()), 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for n, array in numpy_arrays().items():
            data = npy(f"{{'descr': '<f4', 'fortran_order': False, 'shape': {array.shape}, }}\n", array.tobytes())
            archive.writestr(n + ".npy", data[:-4] if n == name else data)
            size = len(data) if n == name else size
    data = path.read_bytes()
    at = data.rindex(f"{name}.npy".encode()) - 46 + 24  # the directory's entry: its field of the size when unpacked
    assert int.from_bytes(data[at:at + 4], "little") == size - 4
    path.write_bytes(data[:at] + size.to_bytes(4, "little") + data[at + 4:])
    with pytest.raises(InputError, match="not a complete .npz"):
        read(load_sae(tmp_path, 3, N))


def test_directory_and_headers_that_claim_more_than_the_file(tmp_path):
    """All of them agree on 800 MB a matrix, in a file of 4 kB."""
    path, wide = write(tmp_path, numpy_arrays()), 10_000_000
    write_claims(path, {"W_enc": (wide, N), "W_dec": (N, wide), "b_dec": (wide,)})
    data = bytearray(path.read_bytes())
    for name, array in numpy_arrays().items():
        if name in ("W_enc", "W_dec", "b_dec"):
            at = data.rindex(f"{name}.npy".encode()) - 46 + 20  # the directory's entry: size as stored, size when unpacked
            size = int.from_bytes(data[at:at + 4], "little") - array.nbytes + array.nbytes // D * wide
            data[at:at + 8] = 2 * size.to_bytes(4, "little")
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(InputError, match="more than it can hold"):
        load_sae(tmp_path, 3, N)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_array_that_is_there_twice(tmp_path):
    path = write(tmp_path, numpy_arrays())
    with zipfile.ZipFile(path) as archive:
        again = archive.read("b_dec.npy")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("b_dec.npy", again)
    with pytest.raises(InputError, match="each once"):
        load_sae(tmp_path, 3, N)


def test_headers_are_not_evaluated(tmp_path):
    path = write(tmp_path, numpy_arrays())
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("b_dec.npy", npy("{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (6,), }\n", bytes(24)))
    with pytest.raises(InputError, match="not a plain numpy array"):
        load_sae(tmp_path, 3, N)


def test_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    n = 3_000_000  # 72 MB of zeros a matrix, in 300 kB
    bomb = {name: np.zeros([{"D": D, "F": n}[letter] for letter in letters], "f4") for name, letters in ARRAYS.items()}
    path = write(tmp_path, bomb, width=n, save=np.savez_compressed)
    del bomb
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(InputError, match="more than it can hold"):
        load_sae(tmp_path, 3, n)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_truncated_or_no_zip_at_all(tmp_path):
    path = write(tmp_path, numpy_arrays())
    whole = path.read_bytes()
    for part in [b"", b"hello", bytes(1000), whole[:-1], whole[1:]] + [whole[:n] for n in range(0, len(whole), 97)]:
        path.write_bytes(part)
        with pytest.raises(InputError, match="params.npz"):
            load_sae(tmp_path, 3, N)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_corrupted_files_give_input_error_or_the_right_arrays(tmp_path, save):
    """Flipped, dropped and inserted bytes: the checksum catches what the headers don't (decoder rows alone aren't summed)."""
    path, draw, refused = write(tmp_path, numpy_arrays(), save=save), random.Random(0), 0
    whole, given = path.read_bytes(), arrays()
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 1, 5, 50])):
            at = draw.randrange(len(data)) if draw.random() < 0.5 else draw.choice(  # half of them into the structures
                [data.find(b"NUMPY") + draw.randrange(100), len(data) - 1 - draw.randrange(300), draw.randrange(60)]) % len(data)
            kind = draw.randrange(4)
            if kind == 0:
                del data[at:at + draw.choice([1, 8, 100])]
            elif kind == 1:
                data[at:at] = draw.randbytes(draw.choice([1, 4]))
            else:
                data[at] = draw.choice([0, 255, draw.randrange(256), data[at] ^ 1 << draw.randrange(8)])
        path.write_bytes(data)
        try:
            sae = load_sae(tmp_path, 3, N)
            sae.decoder_rows([0, 5])
            assert all(torch.equal(getattr(sae, name), given[name]) for name in ARRAYS)
        except InputError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 300


def test_read_params_reads_headers_only(tmp_path):
    path = write(tmp_path, numpy_arrays())
    assert {name: array.shape for name, array in read_params(path).items()} == {name: array.shape for name, array in numpy_arrays().items()}


# ---------------------------------------------------------------------------------------------------------------
# SASA

def test_sasa_worked_example():
    """Blocks of 2: p = (3, 0), (−3, 4), (1, 1) with norms 3, 5, √2; of two that stay the codes are signed."""
    sae = SASA(torch.tensor([[3., 0, 0, 4, 1, 1]]), torch.tensor([0., 0, -3, 0, 0, 0]), torch.eye(6)[:, :1] + 1, torch.tensor([10.]), 2, 2)
    codes = sae.encode(torch.tensor([[1.]]))
    assert codes.tolist() == [[3, 0, -3, 4, 0, 0]] and sae.activations(codes).tolist() == [[3, 5, 0]]
    assert sae.decode(codes).tolist() == [[17.]]                                     # 3·2 + 0·1 − 3·1 + 4·1 + 10
    assert (sae.n_units, sae.n_features) == (3, 6) and sae.unit_rows([0, 2]).tolist() == [[[2], [1]], [[1], [1]]]
    assert sae.encode(torch.zeros(4, 5, 1)).shape == (4, 5, 6)


def test_sasa_round_trip_and_what_it_is_told_from(tmp_path):
    given = {name: tensor for name, tensor in arrays(d=6, n=20).items() if name != "threshold"}
    path = save_sasa(tmp_path, 3, **given, block=5, active=2, about={"nuclear": 0.1})
    assert path == tmp_path / "layer_3/width_20/average_l0_10/sasa.json"
    sae = load_sae(tmp_path, 3, 20)
    assert isinstance(sae, SASA) and (sae.block, sae.active, sae.l0) == (5, 2, 10) and "4 blocks of 5" in str(sae)
    assert all(torch.equal(getattr(sae, name), given[name]) for name in given)
    save_sae(tmp_path / "plain", 3, 7, **arrays())
    assert isinstance(load_sae(tmp_path / "plain", 3, N), JumpReLU)
    directions = sae.directions([1])
    assert torch.allclose(directions[0].abs(), torch.linalg.svd(given["W_dec"][5:10]).Vh[0].abs(), atol=1e-5)


@pytest.mark.parametrize("spoil, says", [
    (lambda place: (place / "sasa.json").write_text('{"block": 3, "active": 2}'), "block 3"),
    (lambda place: (place / "sasa.json").write_text('{"block": 5, "active": 9}'), "active 9"),
    (lambda place: (place / "sasa.json").write_text('{"block": true, "active": 1}'), "block True"),
    (lambda place: (place / "sasa.json").write_text('[]'), "JSON"),
    (lambda place: (place / "sasa.safetensors").unlink(), "no sasa.safetensors"),
    (lambda place: (place / "sasa.safetensors").write_bytes(b"1" * 99), "sasa.safetensors is not"),
    (lambda place: place.parent.rename(place.parent.with_name("width_40")), "width_40 means 40")])
def test_a_bad_sasa_gives_input_error(tmp_path, spoil, says):
    save_sasa(tmp_path, 3, **{name: tensor for name, tensor in arrays().items() if name != "threshold"}, block=5, active=2)
    spoil(tmp_path / f"layer_3/width_{N}/average_l0_10")
    with pytest.raises(InputError, match=says):
        load_sae(tmp_path, 3, 40 if "40" in says else N)


def test_sasa_tensors_that_do_not_fit(tmp_path):
    from run.files import write_tensors
    given = {name: tensor for name, tensor in arrays().items() if name != "threshold"}
    place = save_sasa(tmp_path, 3, **given, block=5, active=2).parent
    for change in ({"W_dec": given["W_dec"][:-1]}, {"b_enc": given["b_enc"] * torch.nan}, {"more": torch.zeros(1)},
                   {"b_dec": given["b_dec"].long()}):
        write_tensors(place / "sasa.safetensors", given | change)
        with pytest.raises(InputError):
            load_sae(tmp_path, 3, N)
