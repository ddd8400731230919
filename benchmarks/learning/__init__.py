"""Learning: pretraining (the loop), time_to_loss (with ablations), quality (with longer lengths), order (by length)."""
