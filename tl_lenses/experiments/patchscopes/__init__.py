"""The experiments of Ghandeharioun et al. 2024 (Patchscopes), one file each."""
