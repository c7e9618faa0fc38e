"""Draw pairs of images and vote on them in a browser on this machine. The preferred images, with their captions, and
the rejected ones become the two folders that --preference_loss dpo trains from."""

import argparse
import logging
import secrets
import sys
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock

if __package__ in (None, ""):  # started as a file: the repository's folder is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import library  # noqa: F401  # checks the packages before they are imported

from PIL import Image

from library.base.atomic_files import atomic_path
from library.base.errors import UserError
from library.base.formatting import format_count
from library.checkpoints.marks import mark_of, save_image
from library.checkpoints.overwriting import FileKind, check_target, judge, marked
from library.commands.command import check_at_least_one, make_training_parser, training_command
from library.options.output.prompts import REFERENCES, PromptSpec, describe_setting
from library.options.training.run import MAX_SEED
from library.training.models.frozen_adapters import parse_adapter
from library.training.report_page.local_server import LocalServer
from library.training.report_page.page import build_page
from tools import draw
from tools.draw import Target

logger = logging.getLogger(__name__)

OUTPUT = Path("output/votes")
CANDIDATES, PREFERRED, REJECTED, SKIPPED = "candidates", "preferred", "rejected", "skipped"  # in the folder of --output
CHOICES = ("left", "right", "skip")

EXAMPLES = """\
  python3 tools/vote.py --base configs/quickstart/toy_base --adapter output/quickstart/quickstart.safetensors \\
    --prompts configs/quickstart/prompts.txt"""


def setup_parser() -> argparse.ArgumentParser:
    parser = make_training_parser(__doc__, EXAMPLES, None, "the model's training script")
    parser.add_argument("--base", required=True, dest="model", help="file, diffusers folder, or name on the hub")
    parser.add_argument("--adapter", nargs="+", action="extend", default=[], metavar="FILE[:STRENGTH]", help="adapters")
    parser.add_argument("--prompts", type=Path, required=True, help="file with prompts, as --sample_prompts takes it")
    parser.add_argument("--pairs", type=int, default=1, help="pairs for each prompt (default: 1)")
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"folder (default: {OUTPUT.as_posix()})")
    parser.add_argument("--port", type=int, default=0, help="port of the page (default: any free one)")
    parser.set_defaults(prompt=[], strengths=None, seed=1)  # of tools/draw.py
    return parser


@dataclass(frozen=True)
class Ballot:
    """Two images of one prompt, and the files that a vote on them writes."""

    folder: Path
    caption: str
    images: tuple[Target, Target]

    @property
    def name(self) -> str:
        return self.images[0].path.stem

    @property
    def mark(self) -> str:
        # Votes on images of another model, adapter or prompt have another digest and are not replaced.
        return mark_of(f"tools/vote.py {draw.digest_of(self.images[0].mark)}", self.images[0].path)

    @property
    def image_kind(self) -> FileKind:
        return marked("the image of a vote on this pair", self.mark)

    @property
    def caption_file(self) -> Path:
        return self.folder / PREFERRED / f"{self.name}.txt"

    def image_file(self, folder: str) -> Path:
        return self.folder / folder / self.images[0].path.name

    def has_vote(self, folder: str) -> bool:
        path = self.image_file(folder)
        return path.exists() and judge(path, self.image_kind) == "ours"

    @property
    def is_open(self) -> bool:
        return not self.has_vote(PREFERRED) and not self.has_vote(SKIPPED)

    def check(self) -> None:
        """Raise UserError if a vote would replace a file that no vote on this pair wrote."""
        is_caption = FileKind("the caption of this pair", lambda path: path.read_bytes() == self.caption.encode())
        check_target("--output", self.caption_file, is_caption)
        for folder in (PREFERRED, REJECTED, SKIPPED):
            check_target("--output", self.image_file(folder), self.image_kind)

    def save(self, choice: str) -> None:
        """Write the vote's files. Raises UserError as `check` does."""
        self.check()
        left, right = self.images
        if choice == "skip":
            return self._save_image(SKIPPED, left)
        with atomic_path(self.caption_file) as temporary:
            temporary.write_bytes(self.caption.encode())
        # The preferred image comes last: it tells that the vote is complete.
        self._save_image(REJECTED, left if choice == "right" else right)
        return self._save_image(PREFERRED, right if choice == "right" else left)

    def _save_image(self, folder: str, target: Target) -> None:
        with Image.open(target.path) as image:
            save_image(self.image_file(folder), image, self.mark, {"parameters": image.info["parameters"]})


class VotingPages:
    """The page of the first open pair, and after the last vote one that says so."""

    def __init__(self, pairs: Sequence[Ballot]) -> None:
        self.is_over = False
        self._pairs = {pair.name: pair for pair in pairs}
        self._lock = Lock()
        self._token = secrets.token_urlsafe()  # known to the page only: other sites can send forms to this port too

    def build(self, name: str) -> str:
        """Return the page of the next pair. Raises KeyError for another name than ""."""
        if name:
            raise KeyError(name)
        pair = next((pair for pair in self._pairs.values() if pair.is_open), None)
        if pair is None:
            self.is_over = True
            return build_page("Votes", "vote.js", {"pair": None})
        left, right = (f"data:image/png;base64,{b64encode(shown.path.read_bytes()).decode()}" for shown in pair.images)
        number, count = [*self._pairs].index(pair.name) + 1, len(self._pairs)
        data = {"pair": pair.name, "caption": pair.caption, "left": left, "right": right, "token": self._token}
        return build_page(f"Pair {number} of {count}", "vote.js", {**data, "number": number, "count": count})

    def take(self, fields: Mapping[str, str]) -> bool:
        """Save a vote, unless the pair has one: of a page that was sent twice the first counts."""
        pair, choice = self._pairs.get(fields.get("pair", "")), fields.get("choice")
        is_own = secrets.compare_digest(fields.get("token", "").encode(), self._token.encode())
        if not is_own or pair is None or choice not in CHOICES:
            return False
        with self._lock:
            if pair.is_open:
                pair.save(choice)
        return True


def double_specs(specs: Sequence[PromptSpec], num_pairs: int) -> Iterator[PromptSpec]:
    """Yield each prompt with two seeds in a row, `num_pairs` times; more pairs come last.

    Raises UserError for reference images, which preferences are not trained with.
    """
    for spec in specs:
        if spec.control_image_path:
            raise UserError(f"{spec.place}: remove {describe_setting(REFERENCES)}; preferences are trained without it")
    for number in range(num_pairs):
        for spec in specs:
            for offset in (2 * number, 2 * number + 1):
                yield replace(spec, seed=(max(0, spec.seed or 0) + offset) % MAX_SEED)


def vote(args: argparse.Namespace, training: Sequence[str]) -> None:
    """Draw the pairs that are not there, show the open ones, and save the votes. Raises UserError for invalid options,
    and for files of others in the folder."""
    check_at_least_one(args, "pairs")
    files = [parse_adapter(text, "--adapter") for text in args.adapter]
    specs = list(double_specs(draw.read_specs(args), args.pairs))
    candidates = argparse.Namespace(**{**vars(args), "output": args.output / CANDIDATES})
    planned = draw.plan_images(candidates, training, files, specs)
    targets = sorted((target for row in planned.rows for target in row), key=lambda target: target.number)
    pairs = [
        Ballot(args.output, spec.prompt, images)
        for spec, images in zip(specs[::2], zip(targets[::2], targets[1::2], strict=True), strict=True)
    ]
    open_pairs = [pair for pair in pairs if pair.is_open]
    for pair in open_pairs:
        pair.check()
    if open_pairs:
        pages = VotingPages(pairs)
        with LocalServer(pages, args.port, pages.take) as server:
            # A row for each pair: a row is written when all of it is drawn.
            rows = [[target for target in pair.images if not is_drawn(target)] for pair in open_pairs]
            if rows := [row for row in rows if row]:
                draw.draw_targets("--base", args.model, training, files, specs, rows)
            logger.info("open %s in a browser to vote; Ctrl-C ends it and keeps the votes", server.url)
            with suppress(KeyboardInterrupt):
                server.serve_forever()
    log_votes(args.output, pairs)


def is_drawn(target: Target) -> bool:
    return target.path.exists() and judge(target.path, marked("the image", target.mark)) == "ours"


def log_votes(folder: Path, pairs: Sequence[Ballot]) -> None:
    """Log what there is, and what to do next."""
    votes = format_count(sum(pair.has_vote(PREFERRED) for pair in pairs), "vote")
    logger.info("%s in %s and %s", votes, folder / PREFERRED, folder / REJECTED)
    if num_open := sum(pair.is_open for pair in pairs):
        logger.info("%s not voted on: run the same command again", format_count(num_open, "pair"))
    else:
        logger.info("all pairs are voted: train on them as docs/preferences.md shows, or add pairs with --pairs")


main = training_command(setup_parser, vote)

if __name__ == "__main__":
    sys.exit(main())
