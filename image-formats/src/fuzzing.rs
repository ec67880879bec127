//! What the fuzz targets run, and the tests over the corpus. No part of the interface.
