"""Everything that only a card can say: run.sh: parts, results; prepare.sh packs what they need."""
