-- Shared by all scripts of one service.
-- KEYS: 1 records, 2 expiry, then the log, if there is one, then, where it matters whether the owner is gone, the mark of
-- that. While a slot is moved, keys that do not exist would stop a script. ARGV: 1 nonce, 2 how to publish ('' where there
-- is no log), 3 channel.
local nonce, say, channel = ARGV[1], ARGV[2], ARGV[3]
local R, X, L, G = KEYS[1], KEYS[2], say ~= '' and KEYS[3], KEYS[say ~= '' and 4 or 3]
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local epoch, head, seen, safe, long, gap
-- What changes: how the log says it, the last that was put, and how the message says it. Of many changes, a message that
-- would be longer than this says only that there are some, and readers ask for the records: to put a long one together
-- takes Lua long. Not so where the caller has done that.
local LONGEST_MESSAGE, LONGEST_SAID = 8192, 131072
local entry, entries, put, message, words, size = {}, 0, nil, {}, 2, 0

-- Lua's own conversion would write 1.79e+12.
local function ms(n) return string.format('%.0f', n) end

-- Owner, epoch and ttl of a value; one that was written by hand may have none.
local function split(v)
  local o, e, l = string.match(v, '^(%S+) (%d+) (%d+) ')
  return o or '', tonumber(e) or 0, tonumber(l) or 0
end

-- Begins with what the store says of itself, or, given a ttl, begins a new history where there is none: then the second
-- answer is true. The third is what it says, and then the values of `ids`.
local function open(ttl, ids)
  local found = redis.call('HMGET', R, '~epoch', '~head', '~seen', '~safe', '~ttl', unpack(ids or {}))
  local m = found
  local fresh = not m[1]
  if fresh then
    if not ttl then return false end
    m = {nonce, '0-0/' .. nonce, ms(now), '0', ttl}
    redis.call('DEL', X)
    if L then redis.call('DEL', L) end
    redis.call('HSET', R, '~epoch', m[1], '~head', m[2], '~seen', m[3], '~safe', m[4], '~ttl', m[5])
  end
  epoch, head = m[1], m[2] or '-'
  seen, safe, long = tonumber(m[3]) or 0, tonumber(m[4]) or 0, tonumber(m[5]) or 0
  -- Not less than lookers that keep a little apart from each other can keep.
  gap = math.max(long * 2 / 3, 500)
  return true, fresh, found
end

-- Nobody looked for a while: the server was down or frozen, and owners get their time to renew first.
local function look()
  local away = now - seen
  if away > gap or away < -gap then safe = now + long end
  return away > gap / 4 or away < 0
end

-- Answers whether it was time to look.
local function looked()
  local due = look()
  if due then redis.call('HSET', R, '~seen', ms(now), '~safe', ms(safe)) end
  return due
end

-- The expiry times were lost (evicted, say): every record gets its ttl anew, a page at a time.
local function heal()
  if redis.call('ZSCORE', X, '~') then return end
  local page = redis.call('HSCAN', R, redis.call('HGET', R, '~heal') or '0', 'COUNT', 200)
  for i = 1, #page[2], 2 do
    local _, _, ttl = split(page[2][i + 1])
    if ttl > 0 then redis.call('ZADD', X, 'NX', ms(now + ttl), page[2][i]) end
  end
  if page[1] == '0' then
    redis.call('ZADD', X, '+inf', '~')
    redis.call('HDEL', R, '~heal')
  else
    redis.call('HSET', R, '~heal', page[1])
  end
end

-- Takes note of a change of a record; `v` is what is put, `said` whether the message is known.
local function changed(op, id, v, said)
  if say == '' then return end
  entry[entries + 1], entry[entries + 2], put = op, id, v
  entries = entries + 2
  if said or size > LONGEST_MESSAGE then return end
  v = v or ''
  local field, value = #id, #v
  size = size + field + value
  message[words + 1], message[words + 2], message[words + 3] = string.format('%s %d %d ', op, field, value), id, v
  words = words + 3
end

local function is_dead(id)
  if now < safe then return false end
  local score = redis.call('ZSCORE', X, id)
  return score and tonumber(score) <= now
end

-- Takes out what is over. The first write is one that a full store refuses: who cannot renew is not taken out either.
local function reap(dead)
  if #dead == 0 then return end
  redis.call('HSET', R, '~seen', ms(now))
  for _, id in ipairs(dead) do
    redis.call('ZREM', X, id)
    if redis.call('HDEL', R, id) == 1 then changed('gone', id) end
  end
end

local function dead(limit)
  if now < safe then return {} end
  return redis.call('ZRANGEBYSCORE', X, '-inf', ms(now), 'LIMIT', 0, limit)
end

-- Ends the change, with one entry of the log, which names the one before it, and one message; `values` are fields and
-- values to be written, and `said` what the message says of the changes, if that is known. The log does not repeat what is
-- put together with others: readers ask for it. A message may fail, the poll does not.
local function done(values, said)
  if entries == 0 then
    if values and #values > 0 then redis.call('HSET', R, unpack(values)) end
    return
  end
  local id
  if put and entries == 2 then id = redis.call('XADD', L, 'MAXLEN', '~', 1000, '*', 'p', head, 'n', nonce, entry[1], entry[2], 'v', put)
  else id = redis.call('XADD', L, 'MAXLEN', '~', 1000, '*', 'p', head, 'n', nonce, unpack(entry)) end
  local was = head
  head = id .. '/' .. nonce
  redis.call('HSET', R, '~head', head, unpack(values or {}))
  message[1], message[2] = was .. ' ', head .. ' '
  if said then said = was .. ' ' .. head .. ' ' .. said
  elseif entries > 2 and size > LONGEST_MESSAGE then said = was .. ' ' .. head
  else said = table.concat(message) end
  redis.pcall(say, channel, said)
end

-- What nobody renews goes by itself, long after its ttl; the records stay where some of them never expire, and when the
-- others expire stays with them.
local function keep()
  local ttl = ms(4 * long + 60000)
  if L then redis.call('PEXPIRE', L, ttl) end
  if redis.call('HLEN', R) - 5 > redis.call('ZCARD', X) - 1 then
    redis.call('PERSIST', R)
    redis.call('PERSIST', X)
  else
    redis.call('PEXPIRE', R, ttl)
    redis.call('PEXPIRE', X, ttl)
  end
end
