#!/bin/sh
# Start the service as the owner of /data, or as uid 10001 where that is root, but never as root.
set -eu

# gunicorn reads WEB_CONCURRENCY before any settings file, and answers a bad one with a traceback.
case "${WEB_CONCURRENCY:-}" in
    "")
        unset WEB_CONCURRENCY
        ;;
    *[!0-9]*)
        echo "WEB_CONCURRENCY: '$WEB_CONCURRENCY' is not a whole number; for example WEB_CONCURRENCY=4" >&2
        exit 1
        ;;
esac

# With --user there is nothing to do.
if [ "$(id -u)" != 0 ]; then
    exec "$@"
fi

uid=$(stat -c %u /data)
gid=$(stat -c %g /data)
# Docker makes a missing ./data as root's.
if [ "$uid" = 0 ]; then
    uid=10001
    gid=10001
fi

drop="setpriv --reuid $uid --regid $gid --clear-groups --no-new-privs"
if ! $drop true 2>/dev/null; then
    echo "This root cannot become uid $uid, to serve as the owner of /data: add the capabilities CHOWN," \
        "SETUID and SETGID, or set the container's user to $uid:$gid" >&2
    exit 1
fi
# Asked as the owner, because without capabilities root cannot look into a private folder.
foreign=$($drop find /data ! -user "$uid" 2>/dev/null || true)
if [ -n "$foreign" ] && ! find /data ! -user "$uid" -exec chown "$uid:$gid" {} + 2>/dev/null; then
    echo "This root cannot make /data the property of uid $uid: add the capabilities CHOWN and" \
        "DAC_READ_SEARCH, or chown the folder to $uid:$gid from outside" >&2
    exit 1
fi
exec $drop "$@"
