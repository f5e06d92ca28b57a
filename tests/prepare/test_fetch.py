"""train.prepare --fetch: the download, the package, its split and credits; parts of a dataset."""

import hashlib
import http.server
import io
import lzma
import tarfile
import threading
import zipfile

import pytest

from tests.helpers.mesh_files import box
from tests.helpers.prepare import SMALL, command, metadata
from train.data.metadata import read_metadata
from train.prepare import parts, sweethome
from train.prepare.fetch import debian_files, download, unzip
from train.prepare.parts import Part
from train.prepare.sweethome import LIBRARIES, properties

# library, model, creator, category: rock3 and female01 are of the fixed evaluation split
MODELS = [
    ("BlendSwap-CC-0", "rock1", "10000bones", "Exterior"),
    ("BlendSwap-CC-0", "rock3", "10000bones", "Exterior"),
    ("BlendSwap-CC-0", "sofa", "Fengquan", "Living room"),
    ("BlendSwap-CC-BY", "lamp", "Jay|Artist", "Lights"),
    ("KatorLegaz", "piano", "Kator Legaz", "Living room"),
    ("Reallusion", "female01", "Reallusion", "Characters"),
    ("Scopia", "rock9", "Scopia", "Exterior"),
]
LICENCE = "Released under\nCreative Commons Attribution 3.0\nhttp://www.blendswap.com/blends/view/9"


def sh3f(library: str) -> bytes:
    """A library as Sweet Home 3D has it: a zip of a catalogue and models."""
    own = [model for model in MODELS if model[0] == library]
    lines = ["# comment#1=no", f"name={library}"]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for i, (_, name, creator, category) in enumerate(own, 1):
            path = f"{library.lower()}/{name}/{name}.obj"
            lines += [f"name#{i}=Bill 10\\u20ac", f"model#{i}=/{path}"]
            lines += [f"creator#{i}={creator}", f"category#{i}={category}"]
            text, mtl = box((1, 0.2 + 0.1 * MODELS.index((library, name, creator, category)), 0.5))
            archive.writestr(path, text)
            archive.writestr(path.replace(".obj", ".mtl"), mtl)
            if name in ("sofa", "lamp"):
                archive.writestr(path.replace(f"{name}.obj", "LICENSE.html"), LICENCE)
        archive.writestr("PluginFurnitureCatalog.properties", "\n".join(lines).encode("latin1"))
    return packed.getvalue()


def deb(members: dict[str, bytes]) -> bytes:
    """An ar archive."""
    content = b"!<arch>\n"
    for name, data in members.items():
        content += f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode()
        content += data + b"\n" * (len(data) % 2)
    return content


def tar(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return packed.getvalue()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of seven models, whose sha256 is the one that is asked for."""
    files = {f"./usr/share/sweethome3d/furniture/{lib}.sh3f": sh3f(lib) for lib in LIBRARIES}
    data = lzma.compress(tar({"./usr/share/doc/copyright": b"x"} | files), preset=0)
    content = deb({"debian-binary": b"2.0\n", "control.tar.xz": b"abc", "data.tar.xz": data})
    file = tmp_path / "package.deb"
    file.write_bytes(content)
    monkeypatch.setattr(sweethome, "SHA256", hashlib.sha256(content).hexdigest())
    return file


def test_models_come_with_split_caption_and_credits(package, tmp_path, capsys):
    out = tmp_path / "o"
    fetch = ["--fetch", "sweethome", "--archive", package, "--out", out, *SMALL]
    assert command(*fetch) == 0
    rows = {row["file_identifier"]: row for row in metadata(out)}
    names = {identifier.split("/")[-1]: row["split"] for identifier, row in rows.items()}
    assert names == {
        "rock3.obj": "test",
        "female01.obj": "test",
        "sofa.obj": "train",
        "lamp.obj": "train",
        "piano.obj": "train",
        "rock9.obj": "train",
    }
    assert rows["Scopia/scopia/rock9/rock9.obj"]["captions"] == '["Bill 10\\u20ac"]'
    text = capsys.readouterr().out
    for line in (
        "BlendSwap-CC-0   CC0 1.0            2      0     1         1",
        "BlendSwap-CC-0   CC BY 3.0          1      1     0         0",
        "Reallusion       CC BY 3.0 US       1      0     1         0",
        "6 objects (6 made, 0 there already), 24 views, 0 skipped",
        "seconds an object in its process: mean",
    ):
        assert line in text
    credits = (out / "ATTRIBUTION.md").read_text(encoding="utf-8").splitlines()
    page = "http://www.blendswap.com/blends/view/9"
    for line in (
        "| BlendSwap-CC-0 | [CC BY 3.0](https://creativecommons.org/licenses/by/3.0/) | "
        "https://www.blendswap.com | 1 |",
        "| Bill 10€ | Jay/Artist | BlendSwap-CC-BY | CC BY 3.0 | Lights | train | "
        f"`BlendSwap-CC-BY/blendswap-cc-by/lamp/lamp.obj` | {page} |",
        "| Bill 10€ | 10000bones | BlendSwap-CC-0 | CC0 1.0 | Exterior | left out | "
        "`BlendSwap-CC-0/blendswap-cc-0/rock1/rock1.obj` |  |",
    ):
        assert line in credits
    # unpacked: the package is not needed again
    package.unlink()
    assert command(*fetch) == 0
    assert "6 objects (0 made, 6 there already)" in capsys.readouterr().out
    assert {p.name for p in (out / "raw").iterdir()} == LIBRARIES.keys()


def test_a_package_that_is_another(package, tmp_path, capsys):
    good = package.read_bytes()
    package.write_bytes(good[:-1])
    fetch = ["--fetch", "sweethome", "--archive", package, "--out", tmp_path / "o", *SMALL]
    assert command(*fetch) == 2
    message = capsys.readouterr().err
    assert f"{package} has sha256 {hashlib.sha256(good[:-1]).hexdigest()}, not " in message
    assert "https://snapshot.debian.org/package/sweethome3d-furniture/1.8-1" in message
    assert command("--archive", package, "--out", tmp_path / "o", *SMALL) == 2
    assert "is for --fetch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK", "it is no Debian package"),
        (deb({"debian-binary": b"2.0\n"}), "it has no member data.tar"),
        (deb({"data.tar.xz": lzma.compress(b"x" * 99)[:50]}), "cannot be unpacked"),
        (deb({"data.tar.rar": b"x"}), "unknown compression type 'rar'"),
        (b"!<arch>\n" + b"x" * 60, "cannot be unpacked"),
    ],
    ids=["no ar", "no data", "cut", "unknown", "nonsense"],
)
def test_packages_that_are_damaged(tmp_path, content, message):
    (tmp_path / "p.deb").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught, debian_files(tmp_path / "p.deb") as f:
        list(f)
    assert "p.deb cannot be unpacked" in str(caught.value)


def test_a_package_of_another_compression(tmp_path):
    (tmp_path / "p.deb").write_bytes(deb({"x": b"odd", "data.tar": tar({"./a": b"text"})}))
    with debian_files(tmp_path / "p.deb") as files:
        assert [(f.name, files.extractfile(f).read()) for f in files] == [("./a", b"text")]


@pytest.mark.parametrize("name", ["../up.txt", "/abs.txt", "a/../../up.txt"])
def test_no_archive_writes_outside_its_folder(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("good.txt", "x")
        archive.writestr(name, "x")
    with pytest.raises(ValueError, match="is no path below"):
        unzip(tmp_path / "a.zip", tmp_path / "in" / "o")
    assert not list(tmp_path.rglob("*.txt"))


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` from where it is asked to, and stops early once."""

    content = bytes(range(256)) * 40
    asked: list = []
    cut = True

    def do_GET(self):
        first = int((self.headers["Range"] or "bytes=0-")[6:-1])
        Server.asked.append(first)
        rest = self.content[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[:4000] if Server.cut else rest)

    def log_message(self, *_):
        pass


def test_a_download_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "asked", [])
    sha = hashlib.sha256(Server.content).hexdigest()
    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/file"
        monkeypatch.setattr(Server, "cut", True)
        with pytest.raises(ValueError, match=r"/file ended after 4,000 of 10,240 bytes"):
            download(url, tmp_path / "raw" / "f", sha)
        monkeypatch.setattr(Server, "cut", False)
        assert download(url, tmp_path / "raw" / "f", sha).read_bytes() == Server.content
        assert Server.asked == [0, 4000]
        download(url, tmp_path / "raw" / "f", sha)
        assert Server.asked == [0, 4000]
        with pytest.raises(ValueError, match=f"has sha256 {sha}, not 0000"):
            download(url, tmp_path / "raw" / "g", "0" * 64)
        assert [p.name for p in (tmp_path / "raw").iterdir()] == ["f"]
        server.shutdown()
    with pytest.raises(ValueError, match="Connection refused"):
        download(url, tmp_path / "raw" / "g", sha)


def test_properties_as_java_writes_them(tmp_path):
    text = "! no=1\n a = b\\=c \\\n   d\nlong\\u00e9=x\\u20ac\n\nempty=\n"
    (tmp_path / "p").write_text(text, encoding="latin1")
    assert properties(tmp_path / "p") == {"a": "b=c d", "longé": "x€", "empty": ""}


# parts


def test_parts_are_disjoint_and_join_to_the_whole(pair, tmp_path, capsys):
    whole, out = tmp_path / "whole", tmp_path / "o"
    assert command(pair, "--out", whole, *SMALL) == 0
    assert command(pair, "--out", out, *SMALL, "--part", "1/2") == 0
    assert "metadata_1_of_2.csv; metadata.csv when all parts are there (1 of 2" in (
        capsys.readouterr().out
    )
    assert not (out / "metadata.csv").exists()
    assert command(pair, "--out", out, *SMALL, "--part", "2/2") == 0
    tables = [read_metadata(out, f"metadata_{k}_of_2.csv") for k in (1, 2)]
    assert [len(rows) for rows in tables] == [1, 1]
    key = lambda row: row["sha256"]
    assert sorted(metadata(out), key=key) == sorted(metadata(whole), key=key)


def test_a_part_joins_again_what_another_wrote_meanwhile(tmp_path, monkeypatch):
    a, b, c = (letter * 64 for letter in "abc")
    for number, sha in ((1, a), (2, b)):
        (tmp_path / f"metadata_{number}_of_2.csv").write_text(f"sha256\n{sha}\n")
    write = parts.write_metadata
    calls = []

    def late(out, rows, **options):
        if not calls:
            (out / "metadata_2_of_2.csv").write_text(f"sha256\n{b}\n{c}\n")
        calls.append(len(rows))
        write(out, rows, **options)

    monkeypatch.setattr(parts, "write_metadata", late)
    assert Part(1, 2).join(tmp_path) == []
    assert calls == [2, 3] and len(metadata(tmp_path)) == 3


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "1/2/3", "-1/2"])
def test_parts_that_cannot_be(text):
    with pytest.raises(ValueError, match="is not K/N with K in 1 to N"):
        Part.parse(text)


def test_every_object_is_of_one_part():
    names = [f"{i:064x}" for i in range(10)]
    taken = [Part(k, 3).of(reversed(names)) for k in (1, 2, 3)]
    assert sorted(map(len, taken)) == [3, 3, 4]
    assert set().union(*taken) == set(names)
