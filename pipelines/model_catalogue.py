"""Catalogue of published models: what each is for, its files, their digests and licences.

Sizes and digests are those of the published files as several independent projects record them;
None where they are not known, and then the source's own published digest is used (see
`pipelines.model_pull`). Nothing is looked for or fetched here.
"""

from dataclasses import dataclass

from animator import licences

HUB = "https://huggingface.co"
INSIGHTFACE_RELEASES = "https://github.com/deepinsight/insightface/releases/download/v0.7"
UNKNOWN_LICENCE = "not known here: the pack's own terms apply"
DWPOSE = f"{HUB}/yzd-v/DWPose/resolve/main"
STABLE_VIDEO_DIFFUSION = f"{HUB}/stabilityai/stable-video-diffusion-img2vid-xt"
# The commit whose sizes and digests stand below.
STABLE_VIDEO_DIFFUSION_COMMIT = "9e43909513c6714f1bc78bcb44d96e733cd242aa"
COTRACKER = f"{HUB}/facebook/cotracker3"
STABLE_ANIMATOR = f"{HUB}/FrancisRing/StableAnimator"


class ModelError(ValueError):
    """A model that is missing or damaged; the message says which, and how to mend it."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """A licence by name, and where its text stands."""

    name: str
    url: str
    non_commercial: bool = False


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One published file. `path` is where it lies below the model's folder (a file's own name)."""

    url: str
    path: str
    size: int | None = None  # bytes
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """One entry of the catalogue.

    `places` are where it may lie below a models folder, the first where a pull puts it. `needs` are
    pulled with it. A face pack comes as one zip and becomes a folder; a model of many files is told
    by its `marks`, globs that must each match; any other model is one file.
    """

    name: str
    kind: str  # face, detector, pose, camera, base, animator
    purpose: str
    places: tuple[str, ...]
    source: str  # for people: the page or file it comes from
    terms: tuple[Terms, ...]
    files: tuple[RemoteFile, ...] = ()
    networks: tuple[tuple[str, str], ...] = ()  # file names and SHA-256 inside a pack
    marks: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def licence(self) -> str:
        """The names of its licences."""
        return "; ".join(terms.name for terms in self.terms)

    @property
    def non_commercial(self) -> bool:
        """Whether one of its licences forbids commercial use."""
        return any(terms.non_commercial for terms in self.terms)

    @property
    def is_pack(self) -> bool:
        """Whether it is a zip of networks that becomes a folder."""
        return self.kind == "face"

    @property
    def size(self) -> int | None:
        """Bytes to fetch; None where a file's size is not known before its source is asked."""
        sizes = [file.size for file in self.files]
        return sum(s for s in sizes if s is not None) if sizes and None not in sizes else None


INSIGHTFACE = Terms(
    name=licences.INSIGHTFACE,
    url="https://github.com/deepinsight/insightface#license",
    non_commercial=True,
)
APACHE = Terms(name="Apache-2.0", url="https://www.apache.org/licenses/LICENSE-2.0")
CC_BY_NC = Terms(
    name="CC BY-NC 4.0 (non-commercial)",
    url="https://github.com/facebookresearch/co-tracker/blob/main/LICENSE.md",
    non_commercial=True,
)
STABILITY = Terms(name=licences.STABILITY, url=f"{STABLE_VIDEO_DIFFUSION}/blob/main/LICENSE.md")

_SCRFD_10G = "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91"
_SCRFD_500M = "5e4447f50245bbd7966bd6c0fa52938c61474a04ec7def48753668a9d8b4ea3a"
_SCRFD_2_5G = "041f73f47371333d1d17a6fee6c8ab4e6aecabefe398ff32cca4e2d5eaee0af9"
_ARCFACE_R50 = "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43"
_ARCFACE_MOBILE = "9cc6e4a75f0e2bf0b1aed94578f144d15175f357bdc05e815e5c4a02b319eb4f"
_ARCFACE_R100 = "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf"


def _pack(name: str, purpose: str, size: int, sha256: str, networks: dict[str, str]) -> KnownModel:
    zipped = RemoteFile(
        url=f"{INSIGHTFACE_RELEASES}/{name}.zip", path=f"{name}.zip", size=size, sha256=sha256
    )
    return KnownModel(
        name=name,
        kind="face",
        purpose=purpose,
        places=(f"face/{name}", f"models/{name}", name),
        source=zipped.url,
        terms=(INSIGHTFACE,),
        files=(zipped,),
        networks=tuple(networks.items()),
    )


def _network(
    name: str,
    kind: str,
    purpose: str,
    file: str,
    url: str,
    size: int,
    sha256: str,
    needs: tuple[str, ...] = (),
) -> KnownModel:
    return KnownModel(
        name=name,
        kind=kind,
        purpose=purpose,
        places=(f"pose/{file}", file),
        source=url,
        terms=(APACHE,),
        files=(RemoteFile(url=url, path=file, size=size, sha256=sha256),),
        needs=needs,
    )


def _hub_files(base: str, *files: tuple[str, int | None, str | None]) -> tuple[RemoteFile, ...]:
    return tuple(
        RemoteFile(url=f"{base}/{path}", path=path, size=size, sha256=sha256)
        for path, size, sha256 in files
    )


CATALOGUE: tuple[KnownModel, ...] = (
    _pack(
        "antelopev2",
        "faces and identity, the strongest; what the published v1 weights were trained with",
        360_662_982,
        "8e182f14fc6e80b3bfa375b33eb6cff7ee05d8ef7633e738d1c89021dcf0c5c5",
        {"scrfd_10g_bnkps.onnx": _SCRFD_10G, "glintr100.onnx": _ARCFACE_R100},
    ),
    _pack(
        "buffalo_l",
        "faces and identity, strong",
        288_621_354,
        "80ffe37d8a5940d59a7384c201a2a38d4741f2f3c51eef46ebb28218a7b0ca2f",
        {"det_10g.onnx": _SCRFD_10G, "w600k_r50.onnx": _ARCFACE_R50},
    ),
    _pack(
        "buffalo_m",
        "faces and identity, with a lighter detector",
        275_951_529,
        "d98264bd8f2dc75cbc2ddce2a14e636e02bb857b3051c234b737bf3b614edca9",
        {"det_2.5g.onnx": _SCRFD_2_5G, "w600k_r50.onnx": _ARCFACE_R50},
    ),
    _pack(
        "buffalo_s",
        "faces and identity, light",
        127_607_557,
        "d85a87f503f691807cd8bb97128bdf7a0660326cd9cd02657127fa978bab8b5e",
        {"det_500m.onnx": _SCRFD_500M, "w600k_mbf.onnx": _ARCFACE_MOBILE},
    ),
    _pack(
        "buffalo_sc",
        "faces and identity, the lightest",
        14_969_382,
        "57d31b56b6ffa911c8a73cfc1707c73cab76efe7f13b675a05223bf42de47c72",
        {"det_500m.onnx": _SCRFD_500M, "w600k_mbf.onnx": _ARCFACE_MOBILE},
    ),
    _network(
        "yolox_l",
        "detector",
        "finds people for the pose network",
        "yolox_l.onnx",
        f"{DWPOSE}/yolox_l.onnx",
        216_746_733,
        "7860ae79de6c89a3c1eb72ae9a2756c0ccfbe04b7791bb5880afabd97855a411",
    ),
    _network(
        "yolox_nano",
        "detector",
        "finds people for the pose network, light",
        "yolox_nano.onnx",
        "https://github.com/Megvii-BaseDetection/YOLOX/releases/download/0.1.1rc0/yolox_nano.onnx",
        3_659_407,
        "c789161ed43c8269fcd4e67c67eeeb4e80c622da2eb296a20bc6007bd18a0b7d",
    ),
    _network(
        "dwpose",
        "pose",
        "body, hands and face keypoints; pulled with its detector yolox_l",
        "dw-ll_ucoco_384.onnx",
        f"{DWPOSE}/dw-ll_ucoco_384.onnx",
        134_399_116,
        "724f4ff2439ed61afb86fb8a1951ec39c6220682803b4a8bd4f598cd913b1843",
        needs=("yolox_l",),
    ),
    KnownModel(
        name="tinypose",
        kind="pose",
        purpose="body keypoints, light; published as a Paddle model, to be exported to ONNX",
        places=("pose/tinypose_256x192.onnx", "tinypose_256x192.onnx"),
        source="https://github.com/PaddlePaddle/PaddleDetection (configs/keypoint/tiny_pose)",
        terms=(APACHE,),
    ),
    KnownModel(
        name="cotracker3-online",
        kind="camera",
        purpose="point tracks, by which curation measures the camera; its package `cotracker` is "
        "installed from its repository",
        places=("cotracker/scaled_online.pth", "scaled_online.pth"),
        source=COTRACKER,
        terms=(CC_BY_NC,),
        files=(
            RemoteFile(url=f"{COTRACKER}/resolve/main/scaled_online.pth", path="scaled_online.pth"),
        ),
    ),
    KnownModel(
        name="svd-xt",
        kind="base",
        purpose="Stable Video Diffusion XT: VAE, image encoder and the UNet that training starts "
        "from",
        places=("svd-xt", "stable-video-diffusion-img2vid-xt"),
        source=STABLE_VIDEO_DIFFUSION,
        terms=(STABILITY,),
        files=_hub_files(
            f"{STABLE_VIDEO_DIFFUSION}/resolve/{STABLE_VIDEO_DIFFUSION_COMMIT}",
            ("model_index.json", 496, None),
            ("unet/config.json", 984, None),
            (
                "unet/diffusion_pytorch_model.fp16.safetensors",
                3_049_435_868,
                "9fbc02e90f37d422f5e3a4aeaee95f6629dc8c45ca211b951626e930daf2bddf",
            ),
            ("vae/config.json", 607, None),
            (
                "vae/diffusion_pytorch_model.fp16.safetensors",
                195_531_910,
                "af602cd0eb4ad6086ec94fbf1438dfb1be5ec9ac03fd0215640854e90d6463a3",
            ),
            ("image_encoder/config.json", 685, None),
            (
                "image_encoder/model.fp16.safetensors",
                1_264_217_240,
                "ae616c24393dd1854372b0639e5541666f7521cbe219669255e865cb7f89466a",
            ),
            ("feature_extractor/preprocessor_config.json", 518, None),
            ("scheduler/scheduler_config.json", 533, None),
        ),
        marks=("unet/config.json", "unet/*.safetensors", "vae/config.json", "vae/*.safetensors"),
    ),
    KnownModel(
        name="stableanimator-v1",
        kind="animator",
        purpose="published weights of the predecessor, for `animator weights import-v1`: its code "
        "is MIT, the weights are trained from Stable Video Diffusion on antelopev2 embeddings",
        places=("stableanimator-v1", "StableAnimator"),
        source=STABLE_ANIMATOR,
        terms=(STABILITY, INSIGHTFACE),
        files=_hub_files(
            f"{STABLE_ANIMATOR}/resolve/main",
            ("Animation/pose_net.pth", None, None),
            ("Animation/face_encoder.pth", None, None),
            ("Animation/unet.pth", None, None),
        ),
        marks=("Animation/pose_net.pth", "Animation/face_encoder.pth", "Animation/unet.pth"),
    ),
)


def known(name: str) -> KnownModel:
    """The catalogue entry called `name`; ModelError names the entries there are."""
    for model in CATALOGUE:
        if model.name == name:
            return model
    names = ", ".join(model.name for model in CATALOGUE)
    raise ModelError(f"no model is called {name!r}; expected one of {names}")
