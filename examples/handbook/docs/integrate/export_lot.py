"""Print the journal of one lot as comma-separated lines."""

import os
import sys
import time
import urllib.error
import urllib.request

HUB = "https://hub.cellar.example:8461"


def fetch_journal(lot_number: str) -> str:
    request = urllib.request.Request(f"{HUB}/t4/v2/lots/{lot_number}/journal.csv")
    request.add_header("X-Cellar-Key", os.environ["CELLAR_KEY"])
    with urllib.request.urlopen(request) as response:
        return response.read().decode("utf-8")


if __name__ == "__main__":
    try:
        print(fetch_journal(sys.argv[1]))
    except urllib.error.HTTPError as error:
        # The hub answers 423 while the turner is working on the lot: wait and ask again.
        if error.code != 423:
            raise
        time.sleep(50)
        print(fetch_journal(sys.argv[1]))
