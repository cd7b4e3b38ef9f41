"""Files: safetensors, JSON and CSV only, written atomically, with a record of the model they are for."""

from tl_lenses.files.atomic import as_path, check_output, versions, write_bytes
from tl_lenses.files.export import FORMATS, write_foreign
from tl_lenses.files.foreign import Given, HasJacobians, read_foreign
from tl_lenses.files.hub import Access, Offer, card, fetch, offers, push
from tl_lenses.files.lock import locked
from tl_lenses.files.maps import check_folder, is_ours, load_maps, place_of, save_maps, sha256
from tl_lenses.files.shards import INDEX, about_states, hash_of_shards, shard_file, text_hash, write_index, write_shard
from tl_lenses.files.states import Notice, is_state, load_state, previous_of, remove_state, save_state, state_exists, states_of
from tl_lenses.files.tables import csv_text, json_text
from tl_lenses.files.text import readable

__all__ = [
    "Access", "FORMATS", "HasJacobians", "INDEX", "Notice", "Offer", "Given", "about_states", "as_path", "card", "check_folder", "check_output",
    "csv_text", "fetch", "hash_of_shards", "is_ours", "is_state", "json_text", "load_maps", "load_state", "locked", "offers", "place_of",
    "previous_of", "push", "read_foreign", "readable", "remove_state", "save_maps", "save_state", "sha256", "shard_file",
    "state_exists", "states_of", "text_hash", "versions", "write_bytes", "write_foreign", "write_index", "write_shard",
]  # fmt: skip
