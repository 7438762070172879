"""python -m study.tables STUDY_FOLDER TABLE.parquet"""

import sys
from pathlib import Path

from study.folder import StudyFolder
from study.tables import recorded

if __name__ == "__main__":
    folder, path = map(Path, sys.argv[1:])
    found = recorded(StudyFolder(folder))
    found.to_parquet(path, index=False, compression="zstd")
    print(f"{path}: {len(found):,} rows, {path.stat().st_size / 1e6:.2f} MB")
