#!/bin/bash
# fsd as a peer of the comparison kit: inode service, REPLICAS+1 block servers, REPLICAS copies, one mount.
# scripts/bench copies this beside the kit's other peers; FSD_PYTHON and FSD_ROOT say which code runs.
PEER=ours; . "$(dirname "$0")/lib.sh"
fsd() { env FSD_RUNTIME_DIR="$DIR/run/fsd" PYTHONPATH="$FSD_ROOT" "${FSD_PYTHON:-python3}" -m mount "$@"; }
peer_start() { : "${FSD_ROOT:?}"; mkdir -p "$DIR/data" "$DIR/run/fsd"; }
peer_mount() {
    export -f fsd; export DIR FSD_ROOT
    pk_run bash -c 'fsd "$@"' fsd up "$MNT" --data "$DIR/data" --servers $((REPLICAS+1)) --replicas "$REPLICAS" \
        --log-file "$DIR/log/mount.log" ${FSD_UP_OPTIONS:-} >>"$DIR/log/up.out" 2>&1 || { tail -5 "$DIR/log/up.out" >&2; return 1; }
    pk_wait 20 mount mounted "$MNT"
}
peer_unmounted() { pk_clientgone "-m mount mount "; }
peer_stop() { pk_run env FSD_RUNTIME_DIR="$DIR/run/fsd" PYTHONPATH="$FSD_ROOT" "${FSD_PYTHON:-python3}" -m mount down --data "$DIR/data" >>"$DIR/log/up.out" 2>&1; }
pk_main "$@"
