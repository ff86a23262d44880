"""The parts of a checkpoint on disk: the released folder, or diffusers'."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from engine.blocks.qwen_language import LanguageConfig
from engine.blocks.weights import Shapes
from engine.errors import CheckpointError, ConfigError
from engine.io.checkpoint import Checkpoint, MappedSource, SafetensorsFile, Source, expect
from engine.io.files import read_json
from engine.io.text import Tokenizer
from engine.models.dreambooth3d.config import DitConfig, VaeConfig
from engine.models.dreambooth3d.glyphs import GlyphConfig, canonical_glyphs
from engine.models.dreambooth3d.text import canonical_text, text_config, text_shapes
from engine.models.dreambooth3d.weights import (
    adapter_kind,
    canonical_adapter,
    canonical_dit,
    canonical_vae,
    dit_shapes,
    vae_shapes,
)

STEM = "diffusion_pytorch_model"
ADAPTER = "pytorch_lora_weights.safetensors"
FOLDERS = {"subject": "subject_adapter", "views": "tdapter"}  # of a subject's two adapters
VIEWS = f"3dapter/{ADAPTER}"  # the pre-trained adapter of reference views
VARIANTS = ("720p_t2v", "480p_t2v")  # of the transformer, in the order in which one is taken
GLYPH_FILE = "text_encoder/Glyph-SDXL-v2/checkpoints/byt5_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20


@dataclass
class Files:
    """Configurations and sources under official names. text, glyphs, tokenizer: None where the folder has none; views:
    the adapter of reference views that came with the base."""

    dit_config: DitConfig
    vae_config: VaeConfig
    text_config: LanguageConfig | None
    dit: Source
    vae: Source
    text: MappedSource | None = None
    tokenizer: Tokenizer | None = None
    glyph_config: GlyphConfig | None = None
    glyphs: MappedSource | None = None
    views: Path | None = None
    opened: tuple[Source, ...] = ()

    @staticmethod
    def of(folder: Path, variant: str | None = None) -> Files:
        """variant: of several transformers, the name of its folder.

        Raises: ConfigError, CheckpointError, TokenizerError; each names the file.
        """
        opened: list[Source] = []

        def weights(where: Path, stem: str) -> Checkpoint:
            opened.append(Checkpoint(where, stem))
            return opened[-1]  # type: ignore[return-value]

        try:
            inside = transformer_folder(folder, variant)
            dit_config = DitConfig.from_json(_config(inside))
            vae_config = VaeConfig.from_json(_config(folder / "vae"))
            dit = canonical_dit(weights(inside, STEM), dit_config)
            expect(MappedSource(dit), dit_shapes(dit_config))
            vae = canonical_vae(weights(folder / "vae", STEM))
            expect(MappedSource(vae), vae_shapes(vae_config))
            out = Files(dit_config, vae_config, None, dit, vae)
            out._read_text(folder, weights)
            out._read_glyphs(folder, opened)
            out.views = folder / VIEWS if (folder / VIEWS).exists() else None
            out.opened = tuple(opened)
            return out.checked()
        except BaseException:
            for source in opened:
                source.close()
            raise

    def _read_text(self, folder: Path, weights) -> None:
        home = next((p for p in (folder / "text_encoder/llm", folder / "text_encoder") if _has_config(p)), None)
        if home is None:
            return
        self.text_config = text_config(_config(home))
        self.text = canonical_text(weights(home, "model"), self.text_config)
        words = next((p for p in (home, folder / "tokenizer") if (p / "tokenizer.json").exists()), None)
        self.tokenizer = None if words is None else Tokenizer.from_folder(words)

    def _read_glyphs(self, folder: Path, opened: list[Source]) -> None:
        if _has_config(folder / "text_encoder_2"):
            home = folder / "text_encoder_2"
            opened.append(Checkpoint(home, "model"))
        elif (folder / GLYPH_FILE).exists() and _has_config(folder / "text_encoder/byt5-small"):
            home = folder / "text_encoder/byt5-small"
            opened.append(SafetensorsFile(folder / GLYPH_FILE))
        else:
            return
        c, source = GlyphConfig.from_json(_config(home)), opened[-1]
        # Fine-tuned on glyphs, the table has rows for colours and fonts that the configuration does not know of.
        table = next((k for k in source.keys() if k.endswith(("shared.weight", "embed_tokens.weight"))), None)  # noqa: SIM118
        shape = () if table is None else source.info(table).shape
        self.glyph_config = replace(c, vocab=max(c.vocab, shape[0])) if shape else c
        self.glyphs = canonical_glyphs(source, self.glyph_config)

    def checked(self) -> Files:
        """Itself. Raises: ConfigError where the parts do not belong together."""
        c = self.dit_config
        if self.vae_config.z != c.channels:
            raise ConfigError(f"the VAE has {self.vae_config.z} channels, the transformer {c.channels}")
        if self.text_config is not None and self.text_config.width != c.text_dim:
            raise ConfigError(f"the text encoder is {self.text_config.width} wide; {c.text_dim} is needed")
        if self.glyph_config is not None and self.glyph_config.width != c.glyph_dim:
            need = f"{c.glyph_dim} is needed" if c.glyph_dim else "the transformer has no place for one (glyph_byT5_v2)"
            raise ConfigError(f"the glyph encoder is {self.glyph_config.width} wide; {need}")
        if self.tokenizer is not None and self.text_config and self.tokenizer.vocab_size > self.text_config.vocab:
            raise ConfigError(
                f"tokenizer.json has {self.tokenizer.vocab_size} tokens and the embedding {self.text_config.vocab} "
                "rows; the files do not belong together"
            )
        return self

    @staticmethod
    def sketch(c: DitConfig, v: VaeConfig, t: LanguageConfig | None) -> Files:
        """Tensors without contents: what a dry arena lays out."""
        text = None if t is None else MappedSource(Shapes(text_shapes(t)))
        return Files(c, v, t, Shapes(dit_shapes(c)), Shapes(vae_shapes(v)), text)

    def close(self) -> None:
        for source in self.opened:
            source.close()


def transformer_folder(folder: Path, variant: str | None = None) -> Path:
    """Where the transformer's config.json lies: `transformer/`, or a variant's folder inside.

    Raises: ConfigError, which lists the variants that are there.
    """
    home = folder / "transformer"
    if variant is None and _has_config(home):
        return home
    there = sorted(p.name for p in home.iterdir() if _has_config(p)) if home.is_dir() else []
    chosen = variant or next((v for v in VARIANTS if v in there), there[0] if len(there) == 1 else None)
    if chosen not in there:
        found = f"it has {', '.join(there)}; choose with variant=" if there else "it has no transformer/config.json"
        raise ConfigError(f"{folder} has no transformer {variant or 'of ' + ' or '.join(VARIANTS)}; {found}")
    return home / chosen


def open_adapter(path: Path, c: DitConfig) -> tuple[str, Source]:
    """An adapter's kind (weights.KINDS) and its tensors under official names. Raises: CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing; an adapter is a file {ADAPTER}")
    source = canonical_adapter(SafetensorsFile(path))
    return adapter_kind(source, c), source


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _config(folder: Path) -> object:
    return read_json(folder / "config.json", limit=MAX_CONFIG_BYTES, error=ConfigError)
