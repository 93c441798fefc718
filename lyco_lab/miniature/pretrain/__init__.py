"""The recipe that makes the miniature's weights from nothing.

    material -> autoencoder -> denoiser      and beside it, in a second process,
             -> text       ->  ...           decoder, oracle, gram, embedder
    -> assemble -> quality

Every part resumes where it was, from the checkpoints in the working folder; a part that is done
is read from there.
"""

from lyco_lab.miniature.pretrain.run import pretrain

__all__ = ["pretrain"]
