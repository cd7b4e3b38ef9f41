"""The experiments of Belrose et al. 2023 (Tuned Lens), one file each."""
