"""The data sets of DomainBed that are folders of domains: PACS, VLCS, Office-Home, Terra Incognita, DomainNet.

Their folders are named as DomainBed's `download.py` leaves them; its archives are read as they are, too. DomainBed evaluates a
whole image, resized to 224x224; here, an image is resized to 256x256, and its centre is evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from ..bench.fetch import Remote
from ..bench.folders import Folders

_DRIVE = "https://drive.google.com/uc?id="  # it answers with a form: a person has to be there


def _places(domains: Mapping[str, str], *parents: str) -> dict[str, tuple[str, ...]]:
    """Domain -> its folder in each of the folders that may hold it."""
    return {domain: tuple(f"{parent}/{folder}" for parent in parents) for domain, folder in domains.items()}


def _by_hand(archive: str, unpack: str, key: str, md5: str) -> tuple[Remote, ...]:
    return (Remote(archive, md5=md5, unpack=unpack, note=f"get {archive} at {_DRIVE}{key}"),)


def _domainnet(domain: str) -> tuple[Remote, ...]:
    cleaned = "groundtruth/" if domain in ("clipart", "painting") else ""
    url = f"http://csr.bu.edu/ftp/visda/2019/multi-source/{cleaned}{domain}.zip"
    return (Remote(f"domain_net/{domain}.zip", (url,), unpack=f"domain_net/{domain}.unpacked"),)


class _DomainBed(Folders):
    augment = "domainbed"


class PACS(_DomainBed):
    """PACS: seven things in photos, art, cartoons and sketches."""

    name = "pacs"
    domains = ("art_painting", "cartoon", "photo", "sketch")
    classes = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    source = "PACS/DOMAIN/CLASS/* under the data root, or DomainBed's PACS.zip"
    licence = "none stated"
    citation = "Li et al., Deeper, Broader and Artier Domain Generalization, ICCV 2017"
    counts: ClassVar[Mapping[str, int]] = {"art_painting": 2048, "cartoon": 2344, "photo": 1670, "sketch": 3929}
    folders: ClassVar[Mapping[str, tuple[str, ...]]] = _places({d: d for d in domains}, "PACS", "PACS/kfold")
    # The md5s of DomainBed's archives are those that LarsKue/context-aware-domain-generalization publishes.
    remotes: ClassVar[Mapping[str, tuple[Remote, ...]]] = dict.fromkeys(
        domains, _by_hand("PACS.zip", "PACS", "1JFr8f805nMUelQWWmfnJR3y4_SYoN5Pd", "fd5db817f7cdafeef3bfd525aaf9b42e")
    )


class VLCS(_DomainBed):
    """VLCS: five classes that four older data sets of photos share."""

    name = "vlcs"
    domains = ("Caltech101", "LabelMe", "SUN09", "VOC2007")
    classes = ("bird", "car", "chair", "dog", "person")
    source = "VLCS/DOMAIN/CLASS/* under the data root, or DomainBed's VLCS.tar.gz"
    licence = "none stated"
    citation = "Fang et al., Unbiased Metric Learning, ICCV 2013"
    counts: ClassVar[Mapping[str, int]] = {"Caltech101": 1415, "LabelMe": 2656, "SUN09": 3282, "VOC2007": 3376}
    folders: ClassVar[Mapping[str, tuple[str, ...]]] = _places({d: d for d in domains}, "VLCS", "VLCS/VLCS")
    remotes: ClassVar[Mapping[str, tuple[Remote, ...]]] = dict.fromkeys(
        domains,
        _by_hand("VLCS.tar.gz", "VLCS", "1skwblH1_okBwxWxmRsp9_qi15hyPpxg8", "8870171eba660927d9668f4e515928e4"),
    )


class OfficeHome(_DomainBed):
    """Office-Home: 65 things of office and home in art, clip art, a shop's photos and everyday photos."""

    name = "office-home"
    domains = ("Art", "Clipart", "Product", "Real_World")
    classes = (
        "Alarm_Clock", "Backpack", "Batteries", "Bed", "Bike", "Bottle", "Bucket", "Calculator", "Calendar",
        "Candles", "Chair", "Clipboards", "Computer", "Couch", "Curtains", "Desk_Lamp", "Drill", "Eraser",
        "Exit_Sign", "Fan", "File_Cabinet", "Flipflops", "Flowers", "Folder", "Fork", "Glasses", "Hammer", "Helmet",
        "Kettle", "Keyboard", "Knives", "Lamp_Shade", "Laptop", "Marker", "Monitor", "Mop", "Mouse", "Mug",
        "Notebook", "Oven", "Pan", "Paper_Clip", "Pen", "Pencil", "Postit_Notes", "Printer", "Push_Pin", "Radio",
        "Refrigerator", "Ruler", "Scissors", "Screwdriver", "Shelf", "Sink", "Sneakers", "Soda", "Speaker", "Spoon",
        "TV", "Table", "Telephone", "ToothBrush", "Toys", "Trash_Can", "Webcam",
    )  # fmt: skip
    source = "office_home/DOMAIN/CLASS/*.jpg under the data root, or DomainBed's office_home.zip"
    licence = "none stated here; see hemanthdv.org/OfficeHome-Dataset"
    citation = "Venkateswara et al., Deep Hashing Network for Unsupervised Domain Adaptation, CVPR 2017"
    counts: ClassVar[Mapping[str, int]] = {"Art": 2427, "Clipart": 4365, "Product": 4439, "Real_World": 4357}
    _archive = "OfficeHomeDataset_10072016"
    folders: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **_places({d: d for d in domains[:3]}, "office_home", f"office_home/{_archive}", _archive),
        "Real_World": tuple(
            f"{parent}/{name}"
            for parent in ("office_home", f"office_home/{_archive}", _archive)
            for name in ("Real World", "Real_World")
        ),
    }
    remotes: ClassVar[Mapping[str, tuple[Remote, ...]]] = dict.fromkeys(
        domains,
        _by_hand(
            "office_home.zip", "office_home", "1uY0pj7oFsjMxRwaD3Sxy0jgel0fsYXLC", "b1c14819770c4448fd5b6d931031c91c"
        ),
    )


class TerraIncognita(_DomainBed):
    """Terra Incognita: wild animals before the camera traps of four locations.

    DomainBed's script sorts the images of LILA's Caltech Camera Traps into folders. The counts are those of the annotations
    that DomainBed's paper used; with newer ones the script finds 24,330 images.
    """

    name = "terra-incognita"
    domains = ("location_100", "location_38", "location_43", "location_46")
    classes = ("bird", "bobcat", "cat", "coyote", "dog", "empty", "opossum", "rabbit", "raccoon", "squirrel")
    source = "terra_incognita/DOMAIN/CLASS/*.jpg under the data root"
    licence = "none stated here; see lila.science/datasets/caltech-camera-traps"
    citation = "Beery et al., Recognition in Terra Incognita, ECCV 2018"
    counts: ClassVar[Mapping[str, int]] = {
        "location_100": 4879,
        "location_38": 9767,
        "location_43": 4020,
        "location_46": 6122,
    }
    folders: ClassVar[Mapping[str, tuple[str, ...]]] = _places({d: d for d in domains}, "terra_incognita")
    remotes: ClassVar[Mapping[str, tuple[Remote, ...]]] = dict.fromkeys(
        domains,
        (Remote("terra_incognita", note="let DomainBed's domainbed/scripts/download.py make the folder"),),
    )


class DomainNet(_DomainBed):
    """DomainNet: 345 classes in clip art, infographics, paintings, quick drawings, photos and sketches.

    The counts are those of its cleaned version. Archives that still hold duplicates give more images; DomainBed's script
    removes them (`domainbed/misc/domain_net_duplicates.txt`).
    """

    name = "domainnet"
    domains = ("clipart", "infograph", "painting", "quickdraw", "real", "sketch")
    class_count = 345
    source = "domain_net/DOMAIN/CLASS/* under the data root, or the archives, DOMAIN.zip"
    licence = "none stated here; see ai.bu.edu/M3SDA"
    citation = "Peng et al., Moment Matching for Multi-Source Domain Adaptation, ICCV 2019"
    counts: ClassVar[Mapping[str, int]] = {
        "clipart": 48_129,
        "infograph": 51_605,
        "painting": 72_266,
        "quickdraw": 172_500,
        "real": 172_947,
        "sketch": 69_128,
    }
    folders: ClassVar[Mapping[str, tuple[str, ...]]] = {
        d: (f"domain_net/{d}", f"domain_net/{d}.unpacked/{d}") for d in domains
    }
    remotes: ClassVar[Mapping[str, tuple[Remote, ...]]] = {d: _domainnet(d) for d in domains}
