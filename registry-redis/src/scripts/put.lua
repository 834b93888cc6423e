-- ARGV: 4 owner, 5 ttl, 6 how long the records live (0 for ever), 7 'claim' or 'restore', 8 the records as a message says
-- that they were put, then for each the digest of what it may replace. Answers the head, if all of them are there now and
-- there was a history; else {head, 1 if this began one, and for each that is not there its position, from 0, and the digest
-- and value of what is there instead}.
if redis.call('EXISTS', KEYS[#KEYS]) == 1 then return {'gone'} end
local owner, ttl, life, restoring, said = ARGV[4], ARGV[5], ARGV[6], ARGV[7] == 'restore', ARGV[8]
-- What was put is told if it is all of them, and not more than this.
local LONGEST_SAID = 131072
local at, n, ids, news = 1, 0, {}, {}
while at <= #said do
  local field, value, from = string.match(said, '^put (%d+) (%d+) ()', at)
  local between = from + field
  at = between + value
  n = n + 1
  ids[n], news[n] = string.sub(said, from, between - 1), string.sub(said, between, at - 1)
end
local _, fresh, olds = open(ttl, ids)
local due = look()
if due then redis.call('HSET', R, '~seen', now, '~safe', safe) end
if due or fresh then heal() end
if tonumber(ttl) > long then
  long, due = tonumber(ttl), true
  redis.call('HSET', R, '~ttl', ttl)
end
local taken, log, values, puts = {}, {}, {}, 0
-- When they end is made a text once, not for each of them.
local expiry, lives, ends = {life == '0' and 'ZREM' or 'ZADD', X}, 2, now + life .. ''
for k = 1, n do
  local id, v, old, expected = ids[k], news[k], olds[k + 5], ARGV[8 + k]
  local free = not old
  if old then
    if expected ~= '' then free = redis.sha1hex(old) == expected
    elseif restoring then
      local o, e = string.match(old, '^(%S+) (%d+) ')
      free = o == owner and tonumber(e) <= tonumber(string.match(v, '^%S+ (%d+) '))
    end
    -- The dead do not hold what is restored.
    if restoring and not free and now >= safe then
      local score = redis.call('ZSCORE', X, id)
      free = score and tonumber(score) <= now
    end
  end
  if free then
    if old ~= v then
      log[puts + 1], log[puts + 2], values[puts + 1], values[puts + 2] = 'put', id, id, v
      puts = puts + 2
    end
    if life ~= '0' then
      lives = lives + 1
      expiry[lives] = ends
    end
    lives = lives + 1
    expiry[lives] = id
  else
    taken[#taken + 1], taken[#taken + 2], taken[#taken + 3] = k - 1, redis.sha1hex(old), old
  end
end
-- First, as a full store lets a removal pass, and then the override that follows, unless it was time to look.
if lives > 2 then redis.call(unpack(expiry)) end
-- The log does not repeat what is put together with others: readers ask for it.
if puts == 2 then log[3], log[4] = 'v', values[2] end
done(log, values, puts == 2 * n and (n == 1 or #said <= LONGEST_SAID) and said or '')
-- Else whoever looked has seen to that, just before.
if due or fresh or life == '0' then keep() end
if #taken == 0 and not fresh then return head end
return {head, fresh and 1 or 0, unpack(taken)}
